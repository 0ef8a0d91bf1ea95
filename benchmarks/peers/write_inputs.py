"""Writes the shared inputs, with rt_lens: `python -m peers.write_inputs FOLDER [--size full|quick]`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rt_lens as rtl
from peers.inputs import Inputs
from rt_lens.data.builtin import neutral_prompts
from rt_lens.models import BUNDLED_MODELS, DEFAULT_MODEL, chat_text, generate_tokens
from rt_lens.models.sources import bundled_folder

STEER_LAYER, ROW_TOKENS, ANSWER_TOKENS, N_ROWS = 18, 96, 24, 4
SWEEP_WORDS = (" happy", " sad")


@dataclass(frozen=True)
class Size:
    """How much work the tasks are."""

    n_pairs: int
    n_prompts: int
    new_tokens: int
    tuning_steps: int
    sweep_layers: tuple[int, ...]
    sweep_prompts: int


SIZES = {
    "full": Size(64, 16, 32, 20, tuple(range(5, 26)), 32),
    "quick": Size(16, 16, 32, 5, tuple(range(5, 26, 3)), 16),
    "warm": Size(4, 2, 4, 1, (5,), 4),
}


def write_inputs(folder: Path, name: str) -> Path:
    """Writes the vectors and the inputs of a size, and the small ones for warming up (`warm.json`)."""
    model = rtl.load_model()
    train = rtl.load_pairs("mood").split(0.4, 0.2, seed=0)[0]
    vectors = rtl.extract_vectors(model, train.sample(64, seed=0))
    path = vectors.save(folder / "vectors.safetensors")
    chats = [str(chat_text(model, topic)) for topic in train.topics]
    rows = tuning_rows(model, train.topics)
    prompts = lasting(model, chats, vectors, SIZES[name].n_prompts, SIZES[name].new_tokens)
    for kind in (name, "warm"):
        inputs = _inputs(model, train, SIZES[kind], str(path), chats, prompts, rows)
        inputs.write(folder / f"{kind}.json")
    return folder / f"{name}.json"


def _inputs(
    model: Any, train: Any, size: Size, vectors: str, chats: Sequence[str], prompts: Sequence[str], rows: Sequence[Any]
) -> Inputs:
    pairs = train.sample(size.n_pairs, seed=0)
    texts = pairs.texts(model)
    first, second = ((model.tokenizer.encode(word, add_special_tokens=False)[0]) for word in SWEEP_WORDS)
    return Inputs(
        model=str(bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL])),
        pairs=[asdict(pair) for pair in pairs.pairs],
        positive=list(texts.positive),
        negative=list(texts.negative),
        layers=list(range(model.cfg.n_layers)),
        prompts=list(prompts[: size.n_prompts]),
        new_tokens=size.new_tokens,
        steer_layer=STEER_LAYER,
        vectors=vectors,
        tuning_prompts=[prompt for prompt, _, _ in rows],
        tuning_answers=[answer for _, answer, _ in rows],
        tuning_tokens=[ids for _, _, ids in rows],
        answer_tokens=ANSWER_TOKENS,
        tuning_steps=size.tuning_steps,
        sweep_prompts=list((chats * 2)[: size.sweep_prompts]),
        sweep_layers=list(size.sweep_layers),
        sweep_words=SWEEP_WORDS,
        sweep_tokens=(first, second),
    )


def lasting(model: Any, chats: Sequence[str], vectors: Any, n: int, new_tokens: int) -> list[str]:
    """The first chats whose steered greedy responses do not end early, so that every tool makes as many tokens."""
    encoded = model.tokenizer(list(chats), add_special_tokens=False)["input_ids"]
    lasting: list[str] = []
    with model.hooks(fwd_hooks=rtl.add(vectors, layers=[STEER_LAYER], multiplier=1.0)):
        for start in range(0, len(chats), 2 * n):
            responses = generate_tokens(model, encoded[start : start + 2 * n], new_tokens)
            whole = [chat for chat, ids in zip(chats[start:], responses, strict=False) if len(ids) == new_tokens]
            lasting += whole
            if len(lasting) >= n:
                return lasting[:n]
    raise ValueError(f"chats must have at least {n} responses of {new_tokens} tokens, got {len(lasting)}.")


def tuning_rows(model: Any, topics: Sequence[str]) -> list[tuple[str, str, list[int]]]:
    """Prompt, answer and token ids of rows that are exactly ROW_TOKENS long, however they are tokenized."""
    rows = []
    for prompt in _prompts_of_length(model, topics, ROW_TOKENS - ANSWER_TOKENS):
        ids = model.tokenizer.encode(prompt, add_special_tokens=False)
        (answer_ids,) = generate_tokens(model, [ids], ANSWER_TOKENS)
        answer = model.tokenizer.decode(answer_ids)
        whole = model.tokenizer.encode(prompt + answer, add_special_tokens=False)
        if whole == ids + answer_ids and len(whole) == ROW_TOKENS:
            rows.append((prompt, answer, whole))
        if len(rows) == N_ROWS:
            return rows
    raise ValueError(f"topics must give {N_ROWS} rows of {ROW_TOKENS} tokens, got {len(rows)}. Give more topics.")


def _prompts_of_length(model: Any, topics: Sequence[str], length: int) -> Iterator[str]:
    """Chats of a topic, lengthened by words of neutral prompts until they have that many tokens."""
    words = " ".join(neutral_prompts()).split()
    for number, topic in enumerate(topics):
        for n_words in range(len(words)):
            more = " ".join((words * 2)[number : number + n_words])
            prompt = str(chat_text(model, f"{topic} {more}".strip()))
            n_tokens = len(model.tokenizer.encode(prompt, add_special_tokens=False))
            if n_tokens == length:
                yield prompt
            if n_tokens >= length:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    arguments = parser.parse_args()
    print(write_inputs(arguments.folder, arguments.size))


if __name__ == "__main__":
    main()
