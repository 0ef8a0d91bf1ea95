"""Latent steering vectors: sentences come back, rows do not notice one another, files, bad input."""

from __future__ import annotations

import pytest
import torch

from rt_lens.data import SentencePair, load_sentence_pairs
from rt_lens.models.backends import parameters_of
from rt_lens.tuning import LatentVectors, latent_vectors
from rt_lens.tuning import latent as module

SENTENCES = ["It rained all day.", "The sun shone.", "Some snow lay on the ground near the old mill."]
HOW = {"layer": 0, "steps": 20, "learning_rate": 0.3, "progress": False}


@pytest.fixture
def found(tiny):
    return latent_vectors(tiny, SENTENCES, **HOW)


def test_greedy_decoding_gives_the_sentences_back(model):
    """And not without their vectors; where a sentence is said to be recovered, it is what is decoded."""
    odd = "rain the of mill shone near"
    found = latent_vectors(model, [*SENTENCES, odd], layer=12, steps=30, learning_rate=1.0, progress=False)
    assert all(found.recovered[:3]) and all(0 < steps <= 30 for steps in found.steps) and min(found.seconds) > 0
    for sentence, recovered, text in zip(found.sentences, found.recovered, found.decode(model), strict=True):
        assert (text == sentence) == recovered
    plain = LatentVectors(**{**vars(found), "vectors": torch.zeros_like(found.vectors)})
    assert not set(plain.decode(model)) & set(found.sentences)
    ends = found.decode(model, found.between(0, 1, [0.0, 1.0]))
    assert [text.startswith(sentence) for text, sentence in zip(ends, SENTENCES, strict=False)] == [True, True]


def test_a_sentence_that_is_recovered_keeps_its_vector(model):
    """It leaves the batch: later steps, for the sentences that are left, do not move it."""
    alone = latent_vectors(model, SENTENCES[1:2], layer=12, steps=30, learning_rate=1.0, progress=False)
    beside = latent_vectors(model, SENTENCES[1:], layer=12, steps=30, learning_rate=1.0, progress=False)
    assert beside.steps[0] == alone.steps[0] < beside.steps[1]
    assert torch.allclose(beside.vectors[0], alone.vectors[0], atol=1e-3)


def test_a_sentence_alone_is_as_in_a_batch(tiny, found):
    """Left padding and rows that leave change nothing: the same loss at the vector that the batch has found."""
    for number, sentence in enumerate(SENTENCES):
        run = module._Run(
            tiny, [module._ids(tiny, sentence)], [sentence], 0, 1, 0.1, module._start(tiny, found.start), 0
        )  # fmt: skip
        below, mask, targets = run._below([0])
        (loss,), (right,) = run._read(found.vectors[[number]], below, mask, targets)
        assert float(loss) == pytest.approx(found.losses[number], abs=1e-4) and bool(right) == found.recovered[number]


def test_the_loss_is_that_of_a_whole_pass_under_the_hook(tiny, found):
    start = module._start(tiny, found.start)
    ids = [*start, *module._ids(tiny, SENTENCES[2])]
    hook = module._hook(0, module.AddByRow(found.vectors[[2]]))
    with torch.no_grad(), tiny.hooks(fwd_hooks=[hook]):
        likely = tiny(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    mean = -likely.gather(1, torch.tensor(ids[1:])[:, None])[len(start) - 1 :].mean()
    assert float(mean) == pytest.approx(found.losses[2], abs=1e-4)


def test_the_model_is_as_before_and_the_seed_counts(tiny):
    before = {name: parameter.clone() for name, parameter in parameters_of(tiny).items()}
    first, again, other = (
        latent_vectors(tiny, SENTENCES[:2], layer=1, steps=3, seed=seed, progress=False).vectors for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    for name, parameter in parameters_of(tiny).items():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad and parameter.grad is None
    assert not any(point.fwd_hooks for point in tiny.hook_dict.values())


def test_mixtures_and_cosines(tiny, found):
    ends = found.between(0, 1, [0.0, 1.0, 0.5])
    assert torch.equal(ends[0], found.vectors[0]) and torch.allclose(ends[1], found.vectors[1])
    assert torch.allclose(ends[2], (found.vectors[0] + found.vectors[1]) / 2)
    expected = torch.cosine_similarity(found.vectors[:, None], found.vectors[None], dim=-1)
    assert torch.allclose(found.cosines(), expected, atol=1e-6)


def test_a_file_holds_what_was_found(found, tmp_path):
    read = LatentVectors.load(found.save(tmp_path / "sentences.safetensors"))
    assert torch.equal(read.vectors, found.vectors) and read.table() == found.table() and read.model == found.model
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        LatentVectors.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("sentences", "changes", "message"),
    [(["It rained.", " "], {}, "sentences"), ([], {}, "sentences"), (["rain " * 600], {}, "sentences must have from 1"),
     (SENTENCES, {"layer": 9}, "layers contains 9"), (SENTENCES, {"steps": 0}, "steps must be"),
     (SENTENCES, {"learning_rate": float("nan")}, "learning_rate must be")],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_by_name(tiny, sentences, changes, message):
    with pytest.raises(ValueError, match=message):
        latent_vectors(tiny, sentences, **{**HOW, **changes})


def test_a_loss_that_is_not_finite_names_the_sentence(tiny):
    with torch.no_grad():
        next(iter(parameters_of(tiny).values())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss must be finite, got nan in step 0 of 'It rained all day"):
        latent_vectors(tiny, SENTENCES[:1], **HOW)


def test_vectors_of_another_width_are_refused(tiny, found):
    other = LatentVectors(**{**vars(found), "vectors": found.vectors[:, :-1]})
    with pytest.raises(ValueError, match="vectors must have the model's width"):
        other.decode(tiny)


def test_the_built_in_pairs_have_each_grade_as_often():
    pairs = load_sentence_pairs()
    grades = [pair.similarity for pair in pairs]
    assert {grade: grades.count(grade) for grade in set(grades)} == dict.fromkeys([0.0, 1.0, 2.0, 3.0, 4.0], 24)
    assert len({pair.first for pair in pairs}) == 24 and len({pair.second for pair in pairs}) == 120
    assert not {pair.first for pair in pairs} & {pair.second for pair in pairs}


def test_a_file_of_sts_b_is_read_by_its_columns(tmp_path):
    table = tmp_path / "sts.tsv"
    table.write_text("genre\tsentence1\tsentence2\tscore\nnews\tIt rains.\tRain falls.\t4.5\n", encoding="utf-8-sig")
    assert load_sentence_pairs(table) == [SentencePair("It rains.", "Rain falls.", 4.5)]
    table.write_text("sentence1\tsentence2\tscore\nIt rains.\tRain falls.\tmuch\n")
    with pytest.raises(ValueError, match=r"sts\.tsv.*similarity must be a number, got 'much'"):
        load_sentence_pairs(table)
    table.write_text("sentence1\tsentence2\tscore\nIt rains.\t\t3\n")
    with pytest.raises(ValueError, match=r"sts\.tsv.*must have second"):
        load_sentence_pairs(table)
    with pytest.raises(ValueError, match="path must end in"):
        load_sentence_pairs(tmp_path / "sts.xlsx")
