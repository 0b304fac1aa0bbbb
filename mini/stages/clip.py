"""Stage: a small image-text model in the transformers CLIPModel layout, for losses that ask how well a text fits.

Contrastive training on the drawn pictures and three kinds of captions: long ones, short ones, and incomplete ones, in
which every part is there by chance. What a caption says is known exactly, so a batch's other pictures that it fits
too are no mistakes: they share the target. It is no relative of the style scorer, which judges and must stay unseen.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from ...evaluation.stats import Interval, auc, bootstrap
from ...lookahead.vision.images import CLIP_MEAN, CLIP_STD, clip_normalise, resize_square
from ..plan import SIZES, WEIGHTS, Plan
from ..world.data import Pictures
from ..world.faces import GLASSES_NAMES, HAIR_COLOUR_NAMES, HAIR_NAMES, PLACES, SKIN_NAMES, STYLES
from . import stage
from .evaluators import disturb
from .text import find_tokenizer, tokenizer

BATCH = 96
FOLDER = "mini_clip"
SAID = ("style", "place", "skin", "hair", "hair_colour", "glasses", "moustache", "beard", "smile")
_S = SIZES["clip"]
_END = 49407


def build() -> CLIPModel:
    text = {"vocab_size": SIZES["text"]["vocabulary"], "max_position_embeddings": SIZES["text"]["positions"]}
    text |= {"bos_token_id": 49406, "eos_token_id": _END, "pad_token_id": _END}
    config = CLIPConfig(
        text_config={**text, **_S["text"], "projection_dim": _S["projection_dim"]},
        vision_config={**_S["vision"], "projection_dim": _S["projection_dim"]},
        projection_dim=_S["projection_dim"],
        attn_implementation="eager",
    )
    return CLIPModel(config)


def preprocess(picture: Tensor) -> Tensor:
    """[n, 3, h, w] in [0, 1], square, -> the model's pixel_values: what `image_processor` does, with gradients."""
    size = _S["vision"]["image_size"]
    return clip_normalise(resize_square(picture, size))


def image_processor() -> CLIPImageProcessor:
    size = _S["vision"]["image_size"]
    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def incomplete_caption(looks: dict[str, int], keep: list[bool]) -> tuple[str, list[str]]:
    """A caption of those parts of SAID that are to be kept and can be said, and which those are."""
    hair = HAIR_NAMES[looks["hair"]]
    parts = {
        "style": article(STYLES[looks["style"]]),
        "skin": f"{SKIN_NAMES[looks['skin']]} face",
        "hair_colour": f"{HAIR_COLOUR_NAMES[looks['hair_colour']]} hair" if looks["hair"] else "",
        "hair": hair,
        "glasses": GLASSES_NAMES[looks["glasses"]],
        "moustache": "a moustache" if looks["moustache"] else "",
        "beard": "a beard" if looks["beard"] else "",
        "smile": "smiling" if looks["smile"] else "",
        "place": PLACES[looks["place"]],
    }
    wanted = dict(zip(SAID, keep, strict=True))
    said = [name for name, words in parts.items() if words and wanted[name]] or ["style"]
    return ", ".join(parts[name] for name in said), said


class Captions:
    """Tokens of all captions, and what each says: a value for every name in SAID, -1 where it says nothing."""

    def __init__(self, pictures: Pictures, numbers: torch.Generator):
        truth = torch.stack([pictures.labels[k] for k in SAID], 1)
        short = torch.tensor([k in ("style", "place", "smile") for k in SAID])
        keep = torch.rand(truth.shape, generator=numbers) < 0.4
        texts, stated = [], torch.zeros_like(keep)
        for i, (values, wanted) in enumerate(zip(truth.tolist(), keep.tolist(), strict=True)):
            text, said = incomplete_caption(dict(zip(SAID, values, strict=True)), wanted)
            texts.append(text)
            stated[i] = torch.tensor([k in said for k in SAID])
        tokens = tokenizer()
        long = truth.clone()
        long[truth[:, SAID.index("hair")] == 0, SAID.index("hair_colour")] = -1  # nobody says a bald person's
        self.truth = truth
        self.ids = torch.stack([token_ids(tokens, t) for t in (pictures.long, pictures.short, texts)])
        self.said = torch.stack([long, truth.where(short, -1), truth.where(stated, -1)])

    def draw(self, index: Tensor, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
        """Token ids [n, length] of one caption for each picture, and match [n, n]: does text i fit picture j?"""
        kind = torch.randint(3, (len(index),), generator=numbers)
        ids, said, truth = self.ids[kind, index], self.said[kind, index], self.truth[index]
        match = ((said[:, None] == truth[None]) | (said[:, None] < 0)).all(-1)
        return shorten(ids), match


def token_ids(tokens: CLIPTokenizer, texts: list[str]) -> Tensor:
    """int32 [n, 77], filled up with the end token."""
    length = SIZES["text"]["positions"]
    return tokens(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt").input_ids.int()


def shorten(ids: Tensor) -> Tensor:
    """Without the columns in which every text has ended: the text model looks back only, and reads its first end."""
    return ids[:, : int((ids != _END).sum(1).max()) + 1]


def train(folder: Path, pictures: Pictures, plan: Plan) -> None:
    out = folder / "clip.safetensors"
    if out.exists():
        return
    torch.manual_seed(plan.seed + 20)
    device = stage.device()
    model = build().to(device)
    captions = Captions(pictures, torch.Generator().manual_seed(plan.seed + 20))

    def loss(step: int) -> Tensor:
        numbers = stage.numbers_of_step(plan.seed + 20, step)
        index = torch.randint(len(pictures), (BATCH,), generator=numbers)
        ids, match = captions.draw(index, numbers)
        x = preprocess(disturb(pictures.images(index, device), numbers))
        with stage.autocast(device):
            said = model(input_ids=ids.long().to(device), pixel_values=x)
        # [texts, pictures]; the scale may not run away, as in CLIP's own training
        logits = model.logit_scale.clamp(max=4.6).exp() * said.text_embeds.float() @ said.image_embeds.float().T
        wanted = match.float().to(device)
        by_text = F.cross_entropy(logits, wanted / wanted.sum(1, keepdim=True))
        by_picture = F.cross_entropy(logits.T, wanted.T / wanted.T.sum(1, keepdim=True))
        return (by_text + by_picture) / 2

    stage.train("clip", folder, {"model": model}, loss, steps=plan.clip_steps, rate=1e-3, ema=0.998)
    model.logit_scale.data.clamp_(max=4.6)
    write_configuration(model, folder, "clip_")
    stage.write_tensors(out, model.state_dict())
    stage.finish("clip", folder)


def write_configuration(model: CLIPModel, folder: Path, prefix: str = "") -> None:
    """The two files beside the weights that from_pretrained reads."""
    (folder / f"{prefix}config.json").write_text(model.config.to_json_string())
    (folder / f"{prefix}preprocessor_config.json").write_text(image_processor().to_json_string())


def load(folder: Path) -> CLIPModel:
    model = build()
    model.load_state_dict(stage.read_tensors(folder / "clip.safetensors"))
    return model.eval().requires_grad_(False)


def make_folder(to: Path, weights: Path = WEIGHTS) -> Path:
    """A folder that CLIPModel, CLIPImageProcessor and CLIPTokenizer load from: the shipped files, with the tokenizer,
    which comes from the host and is not kept in the repository."""
    to.mkdir(parents=True, exist_ok=True)
    for file in (weights / FOLDER).iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    CLIPTokenizer.from_pretrained(str(find_tokenizer())).save_pretrained(str(to))
    return to


@torch.no_grad()
def embed_pictures(model: CLIPModel, picture: Tensor) -> Tensor:
    """Unit vectors [n, projection] of pictures [n, 3, h, w] in [0, 1]."""
    return F.normalize(model.visual_projection(model.vision_model(preprocess(picture)).pooler_output), dim=-1)


@torch.no_grad()
def embed_texts(model: CLIPModel, texts: list[str]) -> Tensor:
    """Unit vectors [n, projection]."""
    ids = shorten(token_ids(tokenizer(), texts)).long()
    return F.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)


def measure(model: CLIPModel, pictures: Pictures) -> dict[str, Interval]:
    """Zero-shot accuracies and retrieval on pictures of people it has not seen; intervals by drawing people.

    Style and place are chosen among short prompts (a place's prompts averaged over styles, and the other way round);
    a picture's long caption is looked for among those of 50 pictures in a row, and among all; AUCs are those of a
    picture's closeness to a few words, pictures for which they are true against the others.
    """
    index = torch.arange(len(pictures))
    seen = torch.cat([embed_pictures(model, pictures.images(i)) for i in index.split(200)])
    prompts = [f"{article(s)} of a face {p}".strip() for s in STYLES for p in PLACES]
    said = embed_texts(model, prompts).unflatten(0, (len(STYLES), len(PLACES)))
    distinct = list(dict.fromkeys(pictures.long))
    own = torch.tensor([distinct.index(t) for t in pictures.long])
    long = embed_texts(model, distinct)
    near = torch.cat([(seen[i] @ long[own[i]].T).argmax(1) + i[0] for i in index.split(50)])
    right = {
        "style, zero-shot": (seen @ F.normalize(said.mean(1), dim=-1).T).argmax(1) == pictures.labels["style"],
        "place, zero-shot": (seen @ F.normalize(said.mean(0), dim=-1).T).argmax(1) == pictures.labels["place"],
        "long caption among 50": own[near] == own,
        f"long caption among {len(distinct)}": (seen @ long.T).argmax(1) == own,
    }
    figures = {}
    for name, values in right.items():
        by_person = values.float().unflatten(0, (-1, pictures.per_person)).mean(1)
        figures[name] = bootstrap(lambda rows, v=by_person: v[rows].mean().item(), len(by_person))
    for name, text in {"smile": "smiling", "moustache": "a moustache", "beard": "a beard"}.items():
        close = (seen @ embed_texts(model, [text])[0]).unflatten(0, (-1, pictures.per_person))
        there = (pictures.labels[name] > 0).unflatten(0, (-1, pictures.per_person))
        figures[f"AUC of {text!r}"] = bootstrap(
            lambda rows, c=close, y=there: auc(c[rows][y[rows]], c[rows][~y[rows]]), len(close), rounds=200
        )
    return figures
