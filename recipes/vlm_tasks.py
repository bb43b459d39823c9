"""The paper's tasks with images, drawn here, and a small vision-language model that has learnt to caption such images.

After arXiv 2508.10180, section 8.3: subjects (30, three training images each), styles (cartoon, pixel art, sketch) and
questions about two animals with wrong answers among them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from data import collate
from PIL import Image, ImageDraw
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from forvalue_callbacks import TINY_MODEL
from forvalue_callbacks.data.sft import RowConfig, RowPreparer

SIZE, PATCH = 32, 8
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 180),
}
SHAPES = ["square", "circle", "star", "cross", "arrow", "moon"]
PLACES = {"left": (12, 16), "right": (20, 16), "top": (16, 12), "middle": (16, 16)}
STYLES = {"cartoon": "a cartoon", "pixels": "large dots", "sketch": "lines"}
ANIMALS = ["cat", "dog"]
OPENINGS = ["A", "There is a", "The picture shows a", "You see a"]
WHAT, HOW, ANIMAL = "What is in the picture?\n", "How is it made?\n", "What is the animal in the picture?\n"

Example = dict[str, Any]


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a shape around (x, y)."""
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "arrow":
        corners = [(-1, -0.4), (0, -0.4), (0, -1), (1, 0), (0, 1), (0, 0.4), (-1, 0.4)]
    elif shape == "cross":
        t = 0.35
        corners = [(-t, -1), (t, -1), (t, -t), (1, -t), (1, t), (t, t), (t, 1), (-t, 1), (-t, t), (-1, t), (-1, -t)]
        corners.append((-t, -t))
    else:
        n, inner = {"star": (10, 0.4), "circle": (24, 1.0), "moon": (24, 1.0)}[shape]
        radii = [1.0 if i % 2 == 0 else inner for i in range(n)]
        turns = [2 * math.pi * i / n - math.pi / 2 for i in range(n)]
        corners = [(q * math.cos(a), q * math.sin(a)) for q, a in zip(radii, turns, strict=True)]
        if shape == "moon":  # the right half is bent inwards
            corners = [(-0.3 * u if u > 0 else u, v) for u, v in corners]
    return [(x + r * u, y + r * v) for u, v in corners]


def picture(rng: random.Random, shape: str, colour: str, place: str, style: str) -> Image.Image:
    """A coloured shape on a light ground, as a cartoon, as pixel art or as a sketch; no two are alike."""
    ground = tuple(rng.randint(225, 250) for _ in range(3)) if style != "sketch" else (255, 255, 255)
    image = Image.new("RGB", (SIZE, SIZE), ground)
    x, y = (c + rng.uniform(-2, 2) for c in PLACES[place])
    corners = _outline(shape, x, y, rng.uniform(8, 11))
    fill = tuple(max(0, min(255, c + rng.randint(-15, 15))) for c in COLOURS[colour])
    draw = ImageDraw.Draw(image)
    if style == "sketch":
        draw.line([*corners, corners[0]], fill=fill)
    else:
        draw.polygon(corners, fill=fill, outline=(0, 0, 0) if style == "cartoon" else fill)
    if style == "pixels":
        image = image.resize((SIZE // 4, SIZE // 4), Image.Resampling.BOX).resize(
            (SIZE, SIZE), Image.Resampling.NEAREST
        )
    return image


def animal(rng: random.Random, kind: str) -> Image.Image:
    """A face: cats have ears that stand up and whiskers, dogs have ears that hang and a tongue."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(190, 250) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    coat = rng.choice([(120, 80, 40), (90, 90, 90), (200, 160, 100), (60, 50, 45)])
    x, y, r = rng.uniform(14, 18), rng.uniform(16, 19), rng.uniform(8, 10)
    for side in (-1, 1):
        if kind == "cat":
            draw.polygon([(x + side * r, y - 1.5 * r), (x + side * r, y - 0.2 * r), (x + side * 0.2 * r, y - r)], coat)
        else:
            left, right = sorted((x + side * 0.7 * r, x + side * 1.3 * r))
            draw.ellipse((left, y - 0.6 * r, right, y + 1.0 * r), tuple(c // 2 for c in coat))
    draw.ellipse((x - r, y - r, x + r, y + r), coat)
    for side in (-1, 1):
        eye = x + side * 0.4 * r
        draw.ellipse((eye - 1, y - 0.4 * r - 1, eye + 1, y - 0.4 * r + 1), (250, 250, 250))
        if kind == "cat":
            draw.line((x, y + 0.3 * r, x + side * 1.2 * r, y + rng.uniform(0.1, 0.6) * r), (250, 250, 250))
    if kind == "dog":
        draw.ellipse((x - 2, y + 0.3 * r, x + 2, y + 0.9 * r), (230, 90, 100))
    return image


def _example(image: Image.Image, prompt: str, completion: str, label: Any) -> Example:
    return {"image": image, "prompt": prompt, "completion": f" {completion}.", "label": label}


def _shape(rng: random.Random, style: str, shape: str | None = None, colour: str | None = None) -> tuple[Any, ...]:
    shape, colour, place = shape or rng.choice(SHAPES), colour or rng.choice(list(COLOURS)), rng.choice(list(PLACES))
    return picture(rng, shape, colour, place, style), shape, colour, place


def pretraining_rows(n: int, seed: int) -> list[Example]:
    """What the model learns: shapes with and without their colour, how they are drawn, and animals."""
    rng = random.Random(f"pretraining {seed}")
    rows = []
    for i in range(n):
        if i % 3 == 0:
            kind = rng.choice(ANIMALS)
            rows.append(_example(animal(rng, kind), ANIMAL, f"It is a {kind}", kind))
            continue
        style = rng.choice(list(STYLES))
        image, shape, colour, place = _shape(rng, style)
        if i % 6 == 1:
            rows.append(_example(image, HOW, f"It is made of {STYLES[style]}", style))
        else:
            named = f"{colour} {shape}" if rng.random() < 0.5 else shape
            rows.append(_example(image, WHAT, f"A {named} at the {place}", shape))
    return rows


def subject_rows(seed: int) -> tuple[list[Example], list[Example]]:
    """30 subjects, three training and two validation images each. The caption names the kind of thing alone, as in
    DreamBooth, where several subjects are of one kind: here six kinds in five colours, seen in the image only."""
    rng = random.Random(f"subject {seed}")
    sides: tuple[list[Example], list[Example]] = ([], [])
    for shape in SHAPES:
        for colour in COLOURS:
            for i in range(5):
                image, _, _, place = _shape(rng, "cartoon", shape, colour)
                sides[i >= 3].append(_example(image, WHAT, f"A {shape} at the {place}", f"{colour} {shape}"))
    return sides


def style_rows(
    seed: int, train: int = 200, validation: int = 50, named: bool = False
) -> tuple[list[Example], list[Example]]:
    """Three styles. No caption says which, or, if `named`, all do: those of the paper's three data sets differ too."""
    rng = random.Random(f"style {seed}")
    sides: tuple[list[Example], list[Example]] = ([], [])
    for style in STYLES:
        for i in range(train + validation):
            image, shape, colour, place = _shape(rng, style)
            caption = f"A {colour} {shape} at the {place}" + (f", made of {STYLES[style]}" if named else "")
            sides[i >= train].append(_example(image, WHAT, caption, style))
    return sides


def animal_rows(
    seed: int, noise: float, train: int = 400, validation: int = 100
) -> tuple[list[Example], list[Example]]:
    """Two animals; a share of the training answers is wrong. `label`: the answer given; `clean`: is it true."""
    rng = random.Random(f"animals {seed}")
    sides: tuple[list[Example], list[Example]] = ([], [])
    for kind in ANIMALS:
        wrong = set(rng.sample(range(train), round(noise * train)))
        for i in range(train + validation):
            said = ANIMALS[1 - ANIMALS.index(kind)] if i in wrong else kind
            row = _example(animal(rng, kind), ANIMAL, f"It is a {said}", said)
            sides[i >= train].append({**row, "clean": said == kind})
    return sides


def caption_rows(
    seed: int, noise: float, train: int = 400, validation: int = 150
) -> tuple[list[Example], list[Example]]:
    """Captions that hardly repeat, of 1,440. A share of the training rows has the caption of another picture: `label`
    is the shape that it names, `clean`: is it of this picture."""
    rng = random.Random(f"captions {seed}")
    rows = []
    for _ in range(train + validation):
        style = rng.choice(list(STYLES))
        image, shape, colour, place = _shape(rng, style)
        caption = f"{rng.choice(OPENINGS)} {colour} {shape} at the {place}, made of {STYLES[style]}"
        rows.append({**_example(image, WHAT, caption, shape), "clean": True})
    wrong = rng.sample(range(train), round(noise * train))
    said = [{name: rows[i][name] for name in ("completion", "label")} for i in wrong]
    for i, other in zip(wrong, said[1:] + said[:1], strict=True):
        rows[i] |= {**other, "clean": rows[i]["completion"] == other["completion"]}
    return rows[:train], rows[train:]


class Collator:
    """Rows (`image`, `prompt`, `completion`) to model inputs: image, prompt and answer, the answer labelled."""

    def __init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
        self.prepare = RowPreparer(tokenizer, RowConfig(completion_only_loss=True))
        # The tiny model has no token for images. Its padding token stands nowhere in a text: batches mask padding out.
        self.image_token = tokenizer.pad_token_id
        self.n_image_tokens = (SIZE // PATCH) ** 2

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = []
        for example in examples:
            row = self.prepare({name: example[name] for name in ("prompt", "completion")})
            ids = [*[self.image_token] * self.n_image_tokens, *row.input_ids.tolist()]
            rows.append({"input_ids": ids, "labels": [*[-100] * self.n_image_tokens, *row.labels.tolist()]})
        pixels = np.stack([np.asarray(example["image"], dtype=np.float32) for example in examples])
        return {**collate(rows), "pixel_values": torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2).contiguous()}

    def rows(self, examples: list[Example]) -> list[dict[str, torch.Tensor]]:
        """Each row by itself, as the baselines take it: `input_ids`, `labels`, `pixel_values`."""
        batches = (self([example]) for example in examples)
        return [{name: batch[name][0] for name in ("input_ids", "labels", "pixel_values")} for batch in batches]


def untrained_vlm(collator: Collator, seed: int) -> PreTrainedModel:
    """A Llava of 2.4 million parameters around the tiny language model, with a new vision tower of two layers."""
    torch.manual_seed(seed)
    language = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        text_config=language.config,
        vision_config=vision,
        image_token_index=collator.image_token,
        image_seq_length=collator.n_image_tokens,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.get_output_embeddings().load_state_dict(language.get_output_embeddings().state_dict())
    return model
