"""`lookahead concept`: encoders of concepts (after arXiv 2307.06925), and concepts made with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .training import run

if TYPE_CHECKING:
    from ..lookahead.method.concept import Concept
    from ..trainer.recipe import Recipe, Source

app = typer.Typer(
    name="concept",
    help="Turn one picture of anything into a word and offsets of SDXL, and tune them.",
    no_args_is_help=True,
)
OWN = "what its encoder was made for"
Picture = Annotated[Path, typer.Argument(help="Picture of the concept.", show_default=False)]
Base = Annotated[
    str,
    typer.Option(
        help="SDXL as a diffusers folder or a .safetensors; `mini_things` for the mini world's that draws things.",
        show_default=False,
    ),
]
ImageEncoder = Annotated[
    str | None,
    typer.Option(help="CLIP image encoder that the concept encoder was trained with.", show_default="the base's"),
]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Out = Annotated[Path, typer.Option(help="File to write.")]
Stock = Annotated[
    bool, typer.Option("--stock", help="Write a stock LoRA and a stock embedding beside it, which any tool loads.")
]


@app.command()
def train(
    config: options.ConfigFile,
    overrides: options.Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the whole configuration and the memory it takes; train nothing.")
    ] = False,
) -> None:
    """Train a concept encoder on pictures without labels. The same command again goes on where it stopped."""
    import yaml

    from ..trainer.concept.config import ConceptConfig

    settings = ConceptConfig.load(config, overrides or [])
    if dry_run:
        from ..trainer.concept.estimate import training_memory
        from ..trainer.memory import memory_table
        from .concept_shapes import concept_shapes

        print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
        processes = int(os.environ.get("WORLD_SIZE", 1))
        parts = training_memory(settings, processes, concept_shapes(settings.model))
        print(memory_table("Memory of a process at most", parts))
        return
    from .assemble import device
    from .assemble_concept import assemble_concept

    def assembled() -> tuple[Recipe, Source]:
        recipe, source = assemble_concept(settings)
        source.prepare(device())
        recipe.measure(source, device())
        return recipe, source

    run(settings, assembled)


@app.command()
def doctor(
    data: Annotated[Path, typer.Argument(help="Folder of pictures.", show_default=False)],
    size: Annotated[int, typer.Option(min=64, help="Pixels a side that they are trained with (data.size).")] = 1024,
) -> None:
    """Examine a folder of pictures before training; status 1 if a training run would stop at one of them."""
    from ..trainer.concept.doctor import examine_pictures
    from ..trainer.data.pairs import ENDINGS, passed_over

    folder = data.expanduser()
    if others := passed_over(folder):
        print(others)
    report = examine_pictures(folder, size, ENDINGS)
    print(report)
    if report.wrong:
        raise typer.Exit(1)


@app.command()
def predict(
    encoder: Annotated[Path, typer.Argument(help="Concept encoder, from `concept train`.", show_default=False)],
    picture: Picture,
    base: Base,
    image_encoder: ImageEncoder = None,
    precision: Precision = "fp32",
    out: Out = Path("concept.safetensors"),
    stock: Stock = False,
) -> None:
    """Predict a concept from one picture, without tuning: one pass of the encoder."""
    from ..lookahead.files.atomic import check_writable
    from ..lookahead.files.concept_file import read_concept_encoder
    from ..lookahead.files.tensors import sha256
    from ..sdxl.concept_maker import KEPT, predict_concept
    from ..sdxl.images import read
    from ..trainer.concept.config import ConceptModels
    from .assemble_concept import frozen_models, on_device

    check_writable(out)
    network, words, about = read_concept_encoder(encoder)
    pixels = read(picture)
    frozen = on_device(frozen_models(ConceptModels(base=base, image_encoder=image_encoder), precision))
    known = {"encoder_hash": sha256(encoder)}
    known |= {k: about[k] for k in KEPT if k in about}
    size, blend = int(about.get("size", 1024)), float(about.get("blend", 0.25))
    _write(predict_concept(network, words, frozen, pixels, size, blend, known), out, stock)


@app.command()
def tune(
    concept: Annotated[Path, typer.Argument(help="Concept to tune, from `concept predict`.", show_default=False)],
    picture: Picture,
    base: Base,
    image_encoder: ImageEncoder = None,
    precision: Precision = "fp32",
    steps: Annotated[int | None, typer.Option(help="Tuning steps, 0 to 100.", show_default=OWN)] = None,
    batch: Annotated[int | None, typer.Option(help="Noise levels a step.", show_default=OWN)] = None,
    offset_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the attention offsets.", show_default=OWN)
    ] = None,
    word_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the words, a share of a component's size.", show_default=OWN)
    ] = None,
    blend: Annotated[
        float | None, typer.Option(help="Blend of the two attention paths, 0 to 1.", show_default="the concept's")
    ] = None,
    try_words: Annotated[
        int | None,
        typer.Option(
            help="Real words tried before the first step; the best becomes the concept's. 1: the nearest.",
            show_default=OWN,
        ),
    ] = None,
    checkpointing: Annotated[str, typer.Option(help="none, blocks or all: less memory, more time.")] = "blocks",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    out: Out = Path("concept_tuned.safetensors"),
    stock: Stock = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the memory that it takes; tune nothing.")] = False,
) -> None:
    """Tune a concept on its picture. Nothing is written before all steps are done."""
    from ..lookahead.files.atomic import check_writable
    from ..lookahead.files.concept_file import read_concept
    from ..lookahead.method.concept_input import TEMPLATES
    from ..lookahead.method.concept_tuning import Tuning
    from ..sdxl.concept_maker import tuner
    from ..sdxl.images import read
    from ..trainer.concept.config import ConceptModels
    from .assemble_concept import attention, frozen_models, on_device

    if not dry_run:
        check_writable(out)
    before, pixels = read_concept(concept), read(picture)
    rates = {"offset_rate": offset_rate, "word_rate": word_rate}
    settings = Tuning.of(before, steps=steps, batch=batch, blend=blend, seed=seed, words=try_words, **rates)
    model = ConceptModels(base=base, image_encoder=image_encoder)
    if dry_run:
        from ..trainer.concept.estimate import tuning_memory
        from ..trainer.memory import memory_table
        from .concept_shapes import concept_shapes

        rank = max((len(a) for a, _ in before.offsets.values()), default=4)
        size = int(before.about.get("size", 1024))
        parts = tuning_memory(size, rank, precision, checkpointing, settings.blend, concept_shapes(model))
        print(memory_table("Memory of the tuning at most", parts))
        return
    templates = before.about.get("templates", "\n".join(TEMPLATES)).split("\n")
    with tuner(on_device(frozen_models(model, precision)), checkpointing, attention()) as maker:
        after, _ = maker.tune(
            before,
            pixels,
            settings,
            templates,
            lambda step, loss: print(f"step {step}/{settings.steps}  loss {loss:.4g}"),
            make_room=True,
        )
    _write(after, out, stock)


@app.command()
def words(
    concept: Annotated[Path, typer.Argument(help="Concept file.", show_default=False)],
    base: Base,
    dictionary: Annotated[
        Path | None, typer.Option(help="File of nouns, one a line.", show_default="the base's, else all words of CLIP")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Words to name.")] = 5,
) -> None:
    """Name the real words that a concept's soft word is nearest to, with their cosines."""
    from ..lookahead.files.concept_file import read_concept
    from ..lookahead.method.concept import nearest_words
    from ..sdxl.concept import dictionary_of
    from ..trainer.concept.config import ConceptModels
    from .assemble_concept import concept_words, frozen_models
    from .bases import known_base

    made, known = read_concept(concept), known_base(base)
    text = frozen_models(ConceptModels(base=base), "fp32").text
    real = dictionary_of(
        text, concept_words(text, str(dictionary) if dictionary else None, known.nouns if known else ())
    )
    print(f"hard word: {made.word} (token {made.word_id}), chosen when the concept was made")
    places, cosines = nearest_words(made.word_l[None], made.word_g[None], real, count)
    for place, cosine in zip(places[0].tolist(), cosines[0].tolist(), strict=True):
        print(f"{real.texts[place]:20} {cosine:.3f}")


def _write(concept: Concept, out: Path, stock: bool) -> None:
    from ..lookahead.files.concept_file import write_concept, write_stock

    out.parent.mkdir(parents=True, exist_ok=True)
    write_concept(out, concept)
    print(f"Written: {out} (nearest word: {concept.word})")
    if stock:
        for path in write_stock(out.parent, out.stem, concept):
            print(f"Written: {path} (the concept alone, without the second attention path)")
