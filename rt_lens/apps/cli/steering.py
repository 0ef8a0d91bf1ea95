"""Commands that extract vectors and steer with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rt_lens.apps.cli.app import (
    AllowJudge,
    Behaviour,
    ChatTemplateKwargs,
    Dtype,
    JudgeKeyEnv,
    Model,
    VectorFile,
    app,
    experiment_of,
    loaded_model,
    model_for,
    model_of,
    parts_of,
    permissions_of,
    write_page,
)
from rt_lens.common.parsing import layers_of, multipliers_of


@app.command(epilog="Example: rt-lens extract mood --method mean_diff --out mood.safetensors --figure mood.html")
def extract(
    behaviour: Behaviour,
    out: Annotated[Path | None, typer.Option(help="File to write; NAME.safetensors by default.")] = None,
    method: Annotated[str, typer.Option(help="mean_diff, pca, logistic, mass_mean, leace, or random (control).")] = (
        "mean_diff"
    ),
    position: Annotated[
        str, typer.Option(help="last, letter (of an answer), mean, mean prompt, mean response, mean last 5, ...")
    ] = "last",
    hook: Annotated[str, typer.Option(help="resid_pre, resid_mid, resid_post, attn_out or mlp_out.")] = "resid_post",
    n_pairs: Annotated[int, typer.Option(help="Contrast pairs to use, spread over topics.")] = 96,
    seed: Annotated[int, typer.Option(help="Seed for the selection of pairs and the bootstrap.")] = 0,
    figure: Annotated[Path | None, typer.Option(help="HTML file for the figure of the validation.")] = None,
    model: Model = None,
    dtype: Dtype = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    allow_judge: AllowJudge = None,
    judge_key_env: JudgeKeyEnv = None,
) -> None:
    """Extract a vector per layer, and validate it with held-out pairs, split halves and random-vector controls."""
    from rt_lens import plots
    from rt_lens.common.files import check_can_write
    from rt_lens.experiment.run import check_writable
    from rt_lens.vectors.validation import validate_vectors

    permissions = permissions_of(allow_judge, judge_key_env)
    name, train, held_out = parts_of(behaviour, permissions)
    path = out or Path(f"{name}.safetensors")
    check_writable(path.parent)
    check_can_write(path, "out")
    default_model, default = model_of(behaviour, permissions)
    loaded = loaded_model(model or default_model, dtype, chat_template_kwargs, default=default)
    chosen = train.sample(n_pairs, seed=seed)
    validation = validate_vectors(
        loaded, chosen, held_out, method=method, position=position, hook=hook, seed=seed, progress=True
    )
    validation.vectors.save(path)
    measures = [f"{name}{end}" for name in ("accuracy", "auc", "stability") for end in ("", "_low", "_high")]
    columns = ["layer", *measures, "n"]
    typer.echo(validation.layers[columns].to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    typer.echo(f"\n{validation.reason}")
    if figure is not None:
        evidence = plots.validation(
            validation.layers, validation.learning, validation.cosines, recommended=validation.recommended
        )
        write_page(evidence, figure)
    layer = validation.best if validation.best is not None else int(validation.layers["layer"].iloc[-1])
    typer.echo(
        f"Saved {path} ({len(validation.layers)} layers, {len(chosen)} pairs, seed {seed}). Next: "
        f'rt-lens steer {path} "Tell me about your weekend." --layer {layer} --multiplier 2'
    )


@app.command(epilog="Example: rt-lens vectors mood.safetensors --gguf mood.gguf --layers 1-29")
def vectors(
    file: VectorFile,
    gguf: Annotated[Path | None, typer.Option(help="Write a control vector for llama.cpp and repeng.")] = None,
    vllm: Annotated[Path | None, typer.Option(help="Write steering vectors for vLLM-Lens, as JSON.")] = None,
    lm_eval: Annotated[Path | None, typer.Option(help="Write a .pt file for lm-eval's model `steered`.")] = None,
    multiplier: Annotated[float, typer.Option(help="Strength in the files for vLLM-Lens and lm-eval.")] = 1.0,
    layers: Annotated[str | None, typer.Option(help="Blocks, such as 14-22 or 14,18; all by default.")] = None,
) -> None:
    """Show the contents of a file of steering vectors (also .gguf, .pt, .npz of other tools), or convert it."""
    from rt_lens.results.schema import checked_file
    from rt_lens.vectors.interop.gguf import save_gguf
    from rt_lens.vectors.interop.servers import save_lm_eval, save_vllm
    from rt_lens.vectors.interop.tensors import import_vectors

    vectors_file = import_vectors(checked_file(file))
    if layers is not None:
        vectors_file = vectors_file.select(layers_of(layers), vectors_file.kind)
    for key, value in vectors_file.provenance.to_json().items():
        typer.echo(f"{key:>15}: {value!r}")  # a file from elsewhere can hold control characters
    for name, vector in vectors_file.vectors.items():
        typer.echo(f"{name:>32}: shape {tuple(vector.shape)}, norm {float(vector.norm()):.3g}")
    if gguf is not None:
        typer.echo(f"Saved {save_gguf(vectors_file, gguf)}. Next: llama-cli --control-vector-scaled {gguf}:1")
    if vllm is not None:
        typer.echo(
            f"Saved {save_vllm(vectors_file, vllm, multiplier=multiplier)}. Next: give it to vLLM-Lens as "
            "apply_steering_vectors."
        )
    if lm_eval is not None:
        saved = save_lm_eval(vectors_file, lm_eval, multiplier=multiplier)
        typer.echo(f"Saved {saved}. Next: lm_eval --model steered --model_args pretrained=MODEL,steer_path={saved}")


@app.command(epilog="Example: rt-lens sweep mood mood.safetensors --layers 14-22 --out runs/sweep.json")
def sweep(
    behaviour: Behaviour,
    file: VectorFile,
    layers: Annotated[str, typer.Option(help="Blocks, such as 14-22 or 14,18.")] = "14-22",
    multipliers: Annotated[str, typer.Option(help="Comma-separated numbers.")] = "-3,-2,-1,0,1,2,3",
    n_prompts: Annotated[int, typer.Option(help="Validation prompts to use.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the responses in tokens.")] = 24,
    out: Annotated[Path, typer.Option(help="Checkpoint file; rerun the same command to resume.")] = Path("sweep.json"),
    figure: Annotated[Path | None, typer.Option(help="HTML file for the heat map.")] = None,
    model: Model = None,
    dtype: Dtype = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    allow_judge: AllowJudge = None,
    judge_key_env: JudgeKeyEnv = None,
) -> None:
    """Sweep layers x multipliers on validation prompts, and score the responses with the behaviour's scorer."""
    from rt_lens import plots
    from rt_lens.arms.sweeping import sweep as sweep_layers
    from rt_lens.experiment.run import check_writable
    from rt_lens.experiment.validation import validation_task
    from rt_lens.results.schema import checked_file
    from rt_lens.vectors.interop.tensors import import_vectors

    experiment = experiment_of(behaviour, model, dtype, chat_template_kwargs, allow_judge, judge_key_env)
    directions, chosen, doses = import_vectors(checked_file(file)), layers_of(layers), multipliers_of(multipliers)
    check_writable(out.parent)
    loaded = model_for(experiment, dtype, directions)
    task = validation_task(experiment, loaded, max_new_tokens, n_prompts)
    result = sweep_layers(
        loaded, directions, task, layers=chosen, multipliers=doses, hook=directions.kind, path=out
    )  # fmt: skip
    table = result.summary()
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    if figure is not None:
        write_page(plots.sweep(table), figure)
    if len(doses) > 2:
        for layer in chosen:
            typer.echo(str(result.dose_response(layer)))
    typer.echo(
        f"Saved {out} (n = {len(result.prompts)} prompts, seed {result.seed}). "
        f'Next: rt-lens steer {file} "Tell me about your weekend." --layer LAYER --multiplier MULTIPLIER'
    )


@app.command(epilog='Example: rt-lens steer mood.safetensors "Tell me about your weekend." --layer 18 --multiplier -2')
def steer(
    file: VectorFile,
    prompt: Annotated[str, typer.Argument(help="User message.")],
    layer: Annotated[int, typer.Option(help="Block whose output the vector is added to.")],
    multiplier: Annotated[float, typer.Option(help="Times the vector's own norm; a negative one steers away.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the responses in tokens.")] = 60,
    model: Model = None,
    dtype: Dtype = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Generate a response with and without steering."""
    from rt_lens.models.generation import generate
    from rt_lens.results.schema import checked_file
    from rt_lens.steering.binding import add
    from rt_lens.vectors.interop.tensors import import_vectors

    directions = import_vectors(checked_file(file))
    hooks = add(directions, [layer], multiplier, hook=directions.kind)
    loaded = loaded_model(model, dtype, chat_template_kwargs, default=directions.provenance.dtype)
    directions.check_fits(loaded)
    typer.echo(f"untuned:\n{generate(loaded, [prompt], max_new_tokens=max_new_tokens)[0]}\n")
    with loaded.hooks(fwd_hooks=hooks):
        response = generate(loaded, [prompt], max_new_tokens=max_new_tokens)[0]
    typer.echo(f"steered (layer {layer}, multiplier {multiplier:g}):\n{response}")
