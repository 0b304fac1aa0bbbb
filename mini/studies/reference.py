"""How well does each part keep who somebody is, and what does it cost the style?

Arms (nothing, image prompt, KV injection, both) over held-out drawn people. An evaluation recogniser, which took part
in no training, compares each picture with all references; a style scorer says which style it shows. Writes
evaluation.md, .json and .png.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...evaluation.stats import identity_auc, own_and_other, share
from ..files.weights import evaluators
from ..world.faces import STYLES as ALL_STYLES
from .drawing import BOTH, KV, MEASURED_WITH, ReferenceArm, draw
from .study import CFG, SIMILARITY, STYLE, STYLES, Table, pyplot, render, save_figure, write_page

ARMS = {
    "nothing": ReferenceArm(),
    "image prompt": ReferenceArm(image_prompt=1.0),
    "KV": KV,
    "image prompt + KV": BOTH,
}

#: By arm, the similarities of its pictures to their own and to all other references
Similarities = dict[str, dict[str, Tensor]]


def measure(faces: Tensor, drawn: dict[str, Tensor], styles: tuple[str, ...]) -> tuple[Table, Similarities]:
    """Gives by arm figures (`Interval`s over references) and the similarities (own, other) that they come from."""
    recogniser, scorer = evaluators()
    figures, similarities = {}, {}
    asked = torch.tensor([ALL_STYLES.index(s) for s in styles])
    everyone = torch.arange(len(faces))
    with torch.no_grad():
        targets = recogniser.embed(faces)
        for arm, pictures in drawn.items():
            flat = pictures.flatten(0, 1)
            similarity = (recogniser.embed(flat) @ targets.T).unflatten(0, pictures.shape[:2])
            hits = (scorer(flat)[0].argmax(1).unflatten(0, pictures.shape[:2]) == asked).float()
            own, other = own_and_other(similarity, everyone)
            figures[arm] = {
                SIMILARITY: share(similarity[everyone, :, everyone]),
                "identity AUC": identity_auc(similarity),
                "identity AUC, photo": identity_auc(similarity[:, :1]),
                "identity AUC, other styles": identity_auc(similarity[:, 1:]),
                STYLE: share(hits),
                **{f"{STYLE}, {s}": share(hits[:, i]) for i, s in enumerate(styles)},
            }
            similarities[arm] = {"own": own, "other": other}
    return figures, similarities


def page(figures: Table, references: int) -> str:
    """docs/evaluation.md."""
    return render(
        "evaluation.md.jinja",
        figures=figures,
        references=references,
        styles=STYLES,
        cfg=CFG,
        both=BOTH,
        **MEASURED_WITH,
    )


def histograms(similarities: Similarities, path: Path) -> None:
    """Draws how similarity to the own and to other references is distributed, a panel an arm."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(similarities), figsize=(3.4 * len(similarities), 2.6), sharey=True)
    for axis, (arm, values) in zip(axes, similarities.items(), strict=True):
        for name, colour in (("other", "0.6"), ("own", "tab:green")):
            axis.hist(values[name].numpy(), bins=40, range=(-1, 1), density=True, histtype="step", color=colour)
        axis.set(title=arm, xlabel="similarity", xlim=(-1, 1))
    axes[0].legend(["other references", "own reference"], loc="upper left", fontsize=7)
    axes[0].set_yticks([])
    save_figure(figure, path)


def evaluate(references: int, out: Path) -> None:
    """Draw, measure and write: evaluation.md, .json and .png, into `out`."""
    faces, drawn = draw(references, ARMS, STYLES)
    figures, similarities = measure(faces, drawn, STYLES)
    write_page(out, "evaluation", figures, page(figures, references))
    histograms(similarities, out / "evaluation.png")
