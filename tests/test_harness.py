"""The model as lm-eval meets it: log-likelihoods and answers against direct computations, and against lm-eval's own
Hugging Face model on the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import rt_lens as rtl
from rt_lens.data.builtin import neutral_paragraphs
from rt_lens.evaluation import lm_eval_bridge
from rt_lens.evaluation.lm_eval_bridge import chat_of, continued, harness_model, options_of, prefix_of, rolled, written
from rt_lens.models.generation import Sampling
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder
from rt_lens.models.tokens.batches import encode

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " the city of Lyon, far in the south"),
    ("Q: What is 2 + 2?\nA:", " 4"),
    ("Die Straße über den Fluß ist", " naß und 冷たい"),
    ("", "Bread rises."),
    ("It ends with a space ", "here"),
]


def ids_of(model, pairs):
    return [(encode(model, before), encode(model, after)) for before, after in pairs]


def direct(model, before, after, hooks=()):
    """Log-likelihood and greediness of a continuation, from one plain pass."""
    tokens = torch.tensor([[*before, *after[:-1]]])
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        rows = model(tokens, attention_mask=torch.ones_like(tokens))[0, len(before) - 1 :].double().log_softmax(-1)
    wanted = torch.tensor(after)
    return float(rows.gather(1, wanted[:, None]).sum()), bool((rows.argmax(-1) == wanted).all())


# Log-likelihoods


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_continuations_have_the_log_likelihoods_of_plain_passes(tiny, batch_size):
    tiny.double()
    pairs = ids_of(tiny, [pair for pair in PAIRS if pair[0]])
    first = encode(tiny, "Hello there")
    with torch.no_grad():
        likeliest = int(tiny(torch.tensor([first]))[0, -1].argmax())
    pairs.append((first, [likeliest]))
    found = continued(tiny, pairs, batch_size)
    for (total, greedy), (before, after) in zip(found, pairs, strict=True):
        expected, likely = direct(tiny, before, after)
        assert total == pytest.approx(expected, rel=1e-6)
        assert greedy is likely
    assert [greedy for _, greedy in found] == [False] * (len(pairs) - 1) + [True]


def test_edits_of_generated_tokens_act_on_the_continuation_only(tiny, tiny_vectors):
    tiny.double()
    (before, after), other = ids_of(tiny, PAIRS[1:3])
    vector = tiny_vectors.vectors["blocks.0.hook_resid_post"].double()

    def push(h, hook):
        return torch.cat([h[:, : len(before)], h[:, len(before) :] + 4.0 * vector], dim=1)

    with tiny.hooks(fwd_hooks=rtl.add(tiny_vectors, [0], 4.0, positions="generated")):
        found = continued(tiny, [other, (before, after)], 2)[1]
    by_hand = direct(tiny, before, after, [("blocks.0.hook_resid_post", push)])
    assert found[0] == pytest.approx(by_hand[0], rel=1e-6)
    assert abs(by_hand[0] - direct(tiny, before, after)[0]) > 0.01


def test_what_does_not_fit_loses_its_beginning_and_that_is_said(make_tiny):
    small = make_tiny(n_ctx=12).double()
    before, after = list(range(100, 120)), [7, 8, 9]
    with pytest.warns(UserWarning, match="requests: 1 do not fit the context of 12 tokens"):
        (cut, _), (whole, _) = continued(small, [(before, after), (before[:4], after)], 2)
    assert cut == pytest.approx(direct(small, before[-10:], after)[0], rel=1e-6)  # 10 + 3 - 1 tokens are run
    assert whole == pytest.approx(direct(small, before[:4], after)[0], rel=1e-6)
    with pytest.raises(ValueError, match=r"requests must have continuations of 1 to 12 tokens, .*, got 13 at index 1"):
        continued(small, [(before, after), (before, list(range(13)))], 2)
    with pytest.raises(ValueError, match=r"requests must have continuations of .*, got 0 at index 0"):
        continued(small, [(before, [])], 2)


def test_whole_texts_follow_the_token_of_a_beginning_in_windows_side_by_side(make_tiny):
    small = make_tiny(n_ctx=16).double()
    long, short = neutral_paragraphs()[0], "Bread rises."
    ids = encode(small, long)
    assert len(ids) > 40
    everything, expected = [prefix_of(small), *ids], 0.0
    for start in range(0, len(ids), 16):
        begin = min(start, len(ids) - 16)  # the last window is moved back, and counts what is new
        window, wanted = everything[begin : begin + 16], ids[start : start + 16]
        expected += direct(small, window[: start - begin + 1], [*window[start - begin + 1 :], wanted[-1]])[0]
    found = rolled(small, [short, "", long], 3)
    assert found[2] == pytest.approx(expected, rel=1e-6)
    assert found[0] == pytest.approx(direct(small, [prefix_of(small)], encode(small, short))[0], rel=1e-6)
    assert found[1] == 0.0


def test_a_bridge_says_what_the_model_of_the_other_kind_says(model, bridge):
    pairs = ids_of(model, PAIRS[:4])
    ours, theirs = (continued(either, pairs, 3) for either in (model, bridge))
    assert [total for total, _ in theirs] == pytest.approx([total for total, _ in ours], rel=5e-6, abs=1e-3)
    asked = [(before, {"until": ["."], "max_gen_toks": 6}) for before, _ in PAIRS[1:4]]
    assert written(bridge, asked, 2) == written(model, asked, 2)


# Answers


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, ((), 256, Sampling())),
        ({"until": "\n", "max_gen_toks": 8}, (("\n",), 8, Sampling())),
        ({"until": ["a", "", "b"], "do_sample": False, "temperature": 0.7}, (("a", "b"), 256, Sampling())),
        ({"temperature": 0.0, "max_new_tokens": "9"}, ((), 9, Sampling())),
        ({"temperature": 0.5}, ((), 256, Sampling(0.5, seed=3))),
        ({"do_sample": True, "top_k": 4, "top_p": 0.9}, ((), 256, Sampling(1.0, 4, 0.9, 3))),
    ],
)
def test_generation_options_are_read_as_the_harness_reads_them(kwargs, expected):
    options = options_of(kwargs, seed=3)
    until, max_new_tokens, sampling = expected
    assert (options.until, options.max_new_tokens) == (until, max_new_tokens)
    assert options.sampling == (sampling if sampling.temperature else Sampling(0.0, sampling.top_k, sampling.top_p, 3))


def test_an_option_that_is_not_there_is_refused_before_anything_is_written(tiny):
    with pytest.raises(ValueError, match=r"generation_kwargs must be among until, .*, got num_beams"):
        written(tiny, [("a", {}), ("b", {"num_beams": 4})], 2)
    with pytest.raises(ValueError, match=r"generation_kwargs must ask for 1 to 255 new tokens, .* got 256"):
        written(tiny, [("a", {})], 2)


def test_answers_are_cut_before_the_first_stop_text_and_a_batch_ends_with_its_last_row(tiny):
    contexts = ["The lock lets a boat", "Bread rises when", "A map tells"]
    plain = rtl.generate(tiny, contexts, chat=False, max_new_tokens=30)
    stops = [text[len(text) // 2 :][:3] for text in plain]  # each row stops somewhere else, if it is its own stop text
    steps = []

    def count(activation, hook):
        steps.append(activation.shape[1])

    with tiny.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", count)]):
        found = written(tiny, [(context, {"until": stops, "max_gen_toks": 30}) for context in contexts], 3)
    for text, answer in zip(plain, found, strict=True):
        assert answer == text[: min(text.find(stop) for stop in stops if stop in text)]
        assert 0 < len(answer) < len(text)
    assert 1 < len(steps) < 30
    assert written(tiny, [(context, {"max_gen_toks": 30}) for context in contexts], 2) == plain


def test_a_stop_text_that_is_a_special_token_stops_though_answers_do_not_show_it(tiny):
    special = tiny.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert special != tiny.tokenizer.eos_token_id
    steps = []

    def insist(logits, hook):
        steps.append(0)
        if len(steps) == 5:
            logits[..., special] += 1000.0

    def answer(**options):
        steps.clear()
        with tiny.hooks(fwd_hooks=[("unembed.hook_out", insist)]):
            return written(tiny, [("The lock lets a boat", {"max_gen_toks": 12, **options})], 1)[0]

    longer = answer()
    assert len(steps) == 12
    stopped = answer(until=["<|endoftext|>"])
    assert len(steps) < 12
    assert longer.startswith(stopped) and 0 < len(stopped) < len(longer)
    assert stopped == rtl.generate(tiny, ["The lock lets a boat"], chat=False, max_new_tokens=4)[0]


def test_each_request_has_its_own_options_and_random_stream_and_the_batch_size_changes_nothing(tiny):
    requests = [
        ("Bread rises when", {"max_gen_toks": 6}),
        ("A map tells", {"max_gen_toks": 12, "do_sample": True, "temperature": 0.9}),
        ("The lock lets a boat", {"max_gen_toks": 6}),
        ("A map tells", {"max_gen_toks": 12, "do_sample": True, "temperature": 0.9}),
    ]
    found = written(tiny, requests, 4, seed=1)
    assert found == written(tiny, requests, 1, seed=1)
    assert found[1] != found[3] and found[1] != written(tiny, requests, 4, seed=2)[1]
    assert found[0] == rtl.generate(tiny, [requests[0][0]], chat=False, max_new_tokens=6)[0]


def test_a_context_that_leaves_no_room_loses_its_beginning(make_tiny):
    small = make_tiny(n_ctx=24)
    long = neutral_paragraphs()[0]
    with pytest.warns(UserWarning, match="requests: 1 do not fit the context of 24 tokens"):
        found = written(small, [(long, {"max_gen_toks": 4}), ("Bread", {"max_gen_toks": 4})], 2)
    kept = small.tokenizer.decode(encode(small, long)[-20:])
    assert found == rtl.generate(small, [kept, "Bread"], chat=False, max_new_tokens=4)


# Chats


def test_chats_go_through_the_models_template(tiny):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    start = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    assert chat_of(tiny, messages) == start
    assert chat_of(tiny, [*messages, {"role": "assistant", "content": "Well"}], open_answer=False) == start + "Well"


def test_a_template_without_a_system_role_gets_its_text_before_the_users(tiny):
    tiny.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
    )
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    assert chat_of(tiny, messages) == "user: Be kind.\n\nHello?\nbot: "
    with pytest.raises(Exception, match="no system"):
        chat_of(tiny, messages[:1])
    tiny.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="model must have a chat template, got tiny"):
        chat_of(tiny, messages)


# Without lm-eval


def test_importing_it_does_not_need_lm_eval():
    code = "import sys; sys.modules['lm_eval'] = None; import rt_lens.evaluation.lm_eval_bridge"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_lm_eval_the_way_to_it_is_told(tiny, monkeypatch):
    lm_eval_bridge._harness_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r'pip install "rt_lens\[harness\]"'):
        harness_model(tiny)


def test_what_cannot_be_handed_over_is_refused(tiny):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        harness_model(tiny, batch_size=0)
    tiny.tokenizer = None
    with pytest.raises(ValueError, match="model must have a tokenizer"):
        harness_model(tiny)


# With lm-eval


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def theirs(lm_eval):
    """lm-eval's own Hugging Face model on the embedded folder."""
    from lm_eval.models.huggingface import HFLM

    folder = str(bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL]))
    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=4, max_length=64)


@pytest.fixture
def ours(lm_eval, model, monkeypatch):
    monkeypatch.setattr(model.cfg, "n_ctx", 64)
    return harness_model(model, batch_size=4)


def requests_of(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def test_log_likelihoods_are_those_of_lm_evals_own_model(ours, theirs):
    found, expected = (lm.loglikelihood(requests_of(*PAIRS)) for lm in (ours, theirs))
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=5e-6, abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}


def test_rolling_log_likelihoods_are_those_of_lm_evals_own_model(ours, theirs):
    texts = [(neutral_paragraphs()[0],), ("Bread rises.",)]
    assert len(ours.tok_encode(texts[0][0])) > 64
    found, expected = (lm.loglikelihood_rolling(requests_of(*texts)) for lm in (ours, theirs))
    assert found == pytest.approx(expected, rel=5e-6, abs=1e-3)


def test_greedy_answers_are_those_of_lm_evals_own_model(ours, theirs):
    stops = {"until": ["\n\n", ". "], "do_sample": False, "max_gen_toks": 16}
    requests = requests_of(*((before, dict(stops)) for before, _ in PAIRS[:4]), ("One, two,", {"max_gen_toks": 8}))
    found, expected = (lm.generate_until(requests) for lm in (ours, theirs))
    assert found == expected
    assert all(found)


def test_chats_and_the_tokenizers_name_are_those_of_lm_evals_own_model(ours, theirs):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tokenizer_name and "/" not in ours.tokenizer_name
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)


def test_a_task_runs_and_hooks_change_its_result(lm_eval, model, tmp_path):
    from lm_eval.tasks import TaskManager

    rows = [
        {"question": "What is the capital of France?", "choices": ["Paris", "Lyon"], "label": 0},
        {"question": "What is the capital of Japan?", "choices": ["Osaka", "Tokyo"], "label": 1},
        {"question": "What is the capital of Italy?", "choices": ["Rome", "Milan"], "label": 0},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "three_capitals", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "Q: {{question}}\nA:", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip

    def accuracy():
        found = lm_eval.simple_evaluate(
            harness_model(model, batch_size=4), tasks=[task], task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0, apply_chat_template=True,
        )  # fmt: skip
        return found["results"]["three_capitals"]["acc,none"]

    assert accuracy() == 1.0
    noise = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda h, hook: h * 0 + noise)]):
        assert accuracy() < 1.0
