"""Steering vectors and weight deltas on the model hub: a repository with one safetensors file and a card."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from rt_lens.models.hub import hub_token
from rt_lens.models.registry import BUNDLED_MODELS
from rt_lens.tuning.delta import WeightDelta
from rt_lens.vectors.steering_vectors import SteeringVectors

FILES: Mapping[str, type[SteeringVectors] | type[WeightDelta]] = {
    "steering_vectors.safetensors": SteeringVectors,
    "weight_delta.safetensors": WeightDelta,
}
"""The file of a repository -> what it holds."""


def push_to_hub(
    item: SteeringVectors | WeightDelta, repo_id: str, *, private: bool = True, endpoint: str | None = None
) -> str:
    """Writes vectors or a delta to a repository on the hub, with a card that says how they were made.

    The token is that of `HF_TOKEN`, or of `hf auth login`.

    Args:
        item: what to share.
        repo_id: `user/name`; made if it is not there.
        private: whether a repository that is made is private.
        endpoint: of another hub than huggingface.co.

    Returns:
        The commit's address.

    Raises:
        ValueError: if it is neither vectors nor a delta, or the hub refuses.

    Example:
        >>> push_to_hub(vectors, "me/mood-vectors")  # doctest: +SKIP
        'https://huggingface.co/me/mood-vectors/commit/...'
    """
    file = next((name for name, kind in FILES.items() if isinstance(item, kind)), None)
    if file is None:
        raise ValueError(f"item must be SteeringVectors or a WeightDelta, got a {type(item).__name__}.")
    api = HfApi(endpoint=endpoint, token=hub_token(), library_name="rt_lens")
    with tempfile.TemporaryDirectory() as folder, _refusals(repo_id):
        item.save(Path(folder) / file)
        (Path(folder) / "README.md").write_text(hub_card(item, repo_id), encoding="utf-8")
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            delete_patterns=[name for name in FILES if name != file],
            commit_message=f"{file.removesuffix('.safetensors')} of rt_lens",
        )
    return str(commit.commit_url)


def from_hub(
    repo_id: str, *, revision: str | None = None, endpoint: str | None = None
) -> SteeringVectors | WeightDelta:
    """Reads what `push_to_hub` wrote. Only safetensors are read, so nothing of a repository runs.

    Args:
        repo_id: `user/name`.
        revision: branch, tag or commit; the newest by default.
        endpoint: of another hub than huggingface.co.

    Raises:
        ValueError: a repository that is not there or holds neither, or a file that is damaged.

    Example:
        >>> vectors = from_hub("me/mood-vectors")  # doctest: +SKIP
    """
    unreachable = False
    for file, kind in FILES.items():
        try:
            with _refusals(repo_id):
                path = hf_hub_download(repo_id, file, revision=revision, endpoint=endpoint, token=hub_token())
        except LocalEntryNotFoundError:  # no connection, and this file is not in the cache; the other may be
            unreachable = True
        except EntryNotFoundError:
            continue
        else:
            return kind.load(path)
    if unreachable:
        raise ValueError(
            f"repo_id must be a repository that can be reached, got {repo_id}: the hub did not answer. Connect."
        )
    raise ValueError(f"repo_id must be a repository with {' or '.join(FILES)}, got {repo_id}, which has none of them.")


@contextmanager
def _refusals(repo_id: str) -> Iterator[None]:
    """The hub's errors as a ValueError that names the repository; a missing file passes as it is."""
    try:
        yield
    except EntryNotFoundError:
        raise
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"repo_id must be a repository that the hub gives you, got {repo_id!r} ({reason}). Check its name and your "
            "token."
        ) from None


def hub_card(item: SteeringVectors | WeightDelta, repo_id: str) -> str:
    """The README.md of the repository."""
    vectors = isinstance(item, SteeringVectors)
    model = item.provenance.model if vectors else item.model  # type: ignore[union-attr]
    known = BUNDLED_MODELS.get(model.lower())
    base = known.source.partition(",")[0] if known else model
    data = ModelCardData(
        library_name="rt_lens", base_model=base if "/" in base else None,
        tags=["steering-vectors" if vectors else "weight-delta", "representation-tuning"],
    )  # fmt: skip
    use = (
        f'vectors = rtl.tuning.from_hub("{repo_id}")\nwith model.hooks(fwd_hooks=rtl.add(vectors, layers=[LAYER], '
        'multiplier=2.0)):\n    print(rtl.generate(model, ["Tell me about your weekend."]))'
        if vectors
        else f'delta = rtl.tuning.from_hub("{repo_id}")\nwith rtl.applied(model, delta):\n    '
        'print(rtl.generate(model, ["Tell me about your weekend."]))'
    )
    facts = _facts_of_vectors(item) if isinstance(item, SteeringVectors) else _facts_of_delta(item)
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    what = "Steering vectors" if vectors else "A change of weights"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n\n{what} for {base}, made with rt_lens.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        f"```python\nimport rt_lens as rtl\n\nmodel = rtl.load_model({model!r})\n{use}\n```\n"
    )


def _facts_of_vectors(vectors: SteeringVectors) -> dict[str, Any]:
    made = vectors.provenance
    return {
        "behaviour": made.behaviour, "hook points": ", ".join(vectors.hook_names), "method": made.method,
        "position": made.position, "pairs": made.n_pairs, "seed": made.seed, "checksum of the pairs": made.data_sha256,
        "rt_lens": made.version,
    }  # fmt: skip


def _facts_of_delta(delta: WeightDelta) -> dict[str, Any]:
    settings = delta.config
    named = ("direction", "layers", "cosine_weight", "token_weight", "kl_weight", "learning_rate", "seed")
    steps = max((row["step"] for row in delta.history), default=None)
    return {
        "changed parameters": len(delta.changes), "steps": steps,
        **{name: settings[name] for name in named if name in settings},
    }  # fmt: skip


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
