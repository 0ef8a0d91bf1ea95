"""Latent steering vectors on the bundled model: do sentences come back, and do their vectors keep meaning?

    python benchmarks/latent.py                # everything, into benchmarks/results/latent.json
    python benchmarks/latent.py --n 8          # a quick look, printed only

Recovery: sentences of the built-in pairs, and as many of the same words in random order, at three layers and, at one of
them, with the first token right after the start token. Similarity: Spearman's correlation of cosines with the graded
similarity, beside that of the mean of hidden states; intervals over the 24 first sentences. Style: the difference of
means between happy and sad sentences, added to the vectors of plain ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sacrebleu import corpus_bleu
from scipy.stats import spearmanr
from torch import Tensor

import evidence
import rt_lens as rtl
from rt_lens.common.statistics.intervals import mean_interval, share_interval
from rt_lens.data import Answer, Question, SentencePair, load_sentence_pairs
from rt_lens.evaluation import make_scorer
from rt_lens.models.activations import read_activations
from rt_lens.models.forward import model_name
from rt_lens.models.positions import numbers_in, position_of, rows_of
from rt_lens.tuning import LatentVectors, latent_vectors

LAYERS = (6, 15, 24)
SEED, STEPS, RATE = 0, 60, 1.0
Row = dict[str, Any]


def bleu(texts: Sequence[str], sentences: Sequence[str]) -> tuple[float, float, float]:
    """Corpus BLEU with its 95 % bootstrap interval over sentences."""
    chance = np.random.default_rng(SEED)

    def score(chosen: Sequence[int]) -> float:
        return corpus_bleu([texts[i] for i in chosen], [[sentences[i] for i in chosen]]).score

    draws = [score(chance.integers(0, len(texts), len(texts)).tolist()) for _ in range(300)]
    return score(range(len(texts))), *np.percentile(draws, [2.5, 97.5])


def shuffled(sentences: Sequence[str]) -> list[str]:
    """As many sentences of the same words in random order."""
    words, chance = [word for sentence in sentences for word in sentence.split()], random.Random(SEED)
    chance.shuffle(words)
    return [" ".join(words.pop() for _ in sentence.split()) for sentence in sentences]


def recovery(model: Any, found: LatentVectors, kind: str) -> Row:
    n, share, low, high = share_interval(sum(found.recovered), len(found.recovered))
    score, score_low, score_high = bleu(found.decode(model), found.sentences)
    steps, seconds = (mean_interval(list(values), SEED) for values in (found.steps, found.seconds))
    return {
        "sentences": kind, "layer": found.layer, "starts": "on a new line" if found.start else "at once", "n": n,
        "exact": share, "exact_low": low, "exact_high": high, "BLEU": score, "BLEU_low": score_low,
        "BLEU_high": score_high, "steps": steps.mean, "steps_low": steps.low, "steps_high": steps.high,
        "seconds_each": seconds.mean, "seconds_each_low": seconds.low, "seconds_each_high": seconds.high, "seed": SEED,
    }  # fmt: skip


def mean_states(model: Any, sentences: Sequence[str], layer: int) -> Tensor:
    """The mean of each sentence's residuals after a block: the baseline."""
    read_at = position_of("mean")
    reads = [[numbers_in(row, read_at, f"sentence {i}")] for i, row in enumerate(rows_of(model, sentences))]
    name = f"blocks.{layer}.hook_resid_post"
    return read_activations(model, sentences, [name], reads)[name][:, 0]


def correlation(pairs: Sequence[SentencePair], index: dict[str, int], vectors: Tensor, how: str, layer: int) -> Row:
    """Spearman's correlation of cosine and similarity, with its interval over the first sentences."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    cosines = np.array([float(unit[index[pair.first]] @ unit[index[pair.second]]) for pair in pairs])
    grades = np.array([pair.similarity for pair in pairs])
    groups: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(pair.first, []).append(number)
    rows, chance, drawn = list(groups.values()), np.random.default_rng(SEED), []
    for _ in range(2000):
        chosen = [number for at in chance.integers(0, len(rows), len(rows)) for number in rows[at]]
        drawn.append(spearmanr(cosines[chosen], grades[chosen]).statistic)
    low, high = np.percentile(drawn, [2.5, 97.5])
    found = float(spearmanr(cosines, grades).statistic)
    return {"vectors": how, "layer": layer, "n": len(pairs), "spearman": found, "spearman_low": low,
            "spearman_high": high, "seed": SEED}  # fmt: skip


def main(n: Annotated[int, typer.Option(help="Sentences; 0 for all, which writes the results.")] = 0) -> None:
    model = rtl.load_model()
    pairs = load_sentence_pairs()[: n or None]
    sentences = list(dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second)))
    index = {sentence: number for number, sentence in enumerate(sentences)}

    def found(texts: Sequence[str], layer: int, start: str = "\n") -> LatentVectors:
        return latent_vectors(
            model, texts, layer=layer, steps=STEPS, learning_rate=RATE, start=start, seed=SEED, progress=n == 0
        )

    recovered, similar = [], []
    for layer in LAYERS:
        known = found(sentences, layer)
        recovered += [
            recovery(model, known, "known"),
            recovery(model, found(shuffled(sentences), layer), "random words"),
        ]
        similar.append(correlation(pairs, index, known.vectors, "latent", layer))
        similar.append(correlation(pairs, index, mean_states(model, sentences, layer), "mean of hidden states", layer))
        _print([*recovered[-2:], *similar[-2:]])
    recovered.append(recovery(model, found(sentences[:24], LAYERS[1], start=""), "known"))
    _print(recovered[-1:])
    style = transfer(model, found, n)
    _print(style)
    if n == 0:
        about = {"model": model_name(model), "command": "python benchmarks/latent.py", "steps": STEPS, "rate": RATE}
        path = evidence.write("latent", about, {"recovery": recovered, "similarity": similar, "style": style})
        typer.echo(f"Saved {path}.")


def transfer(model: Any, found: Callable[..., LatentVectors], n: int) -> list[Row]:
    """VADER of what plain sentences' vectors give with the happy minus sad difference of means added."""
    happy = ["I am so happy with this lovely day.", "What a wonderful and joyful evening it was.",
             "We laughed and danced all night.", "She loves her great new job.", "Everyone was delighted by the gift.",
             "The trip was a beautiful success."]  # fmt: skip
    sad = ["I am so unhappy with this awful day.", "What a terrible and gloomy evening it was.",
           "We cried and mourned all night.", "She hates her horrible new job.", "Everyone was upset by the insult.",
           "The trip was a painful failure."]  # fmt: skip
    plain = [pair.second for pair in load_sentence_pairs() if pair.similarity == 1][: n or None]
    layer = LAYERS[1]
    difference = found(happy, layer).vectors.mean(0) - found(sad, layer).vectors.mean(0)
    latents = found(plain, layer)
    vader = make_scorer("vader")
    rows = []
    for multiplier in (-2.0, -1.0, 0.0, 1.0, 2.0):
        texts = latents.decode(model, latents.vectors + multiplier * difference, max_new_tokens=16)
        mean = mean_interval(list(vader([Answer(Question("Say something."), text) for text in texts])), SEED)
        rows.append({"multiplier": multiplier, "n": mean.n, "VADER": mean.mean, "VADER_low": mean.low,
                     "VADER_high": mean.high, "example": texts[0], "seed": SEED})  # fmt: skip
    return rows


def _print(rows: Sequence[Row]) -> None:
    for row in rows:
        typer.echo(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    typer.run(main)
