"""Captures activations of a transformer on text, without padding, [CLS] and [SEP].

    python examples/capture_tokens.py MODEL TEXT.txt tokens.h5

MODEL is a folder or name that transformers loads, TEXT.txt holds a text on each line. Then:
sparsekern train sae --activations tokens.h5. Row i of the file is token `origins.token_ids[i]`, at
position `origins.positions[i]` of line `origins.documents[i]`, where `origins = store.origins()`.
"""

import sys
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

from sparsekern.data import capture

model, text, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
lines = Path(text).read_text().splitlines()
batches = (
    tokenizer(lines[i : i + 64], padding=True, truncation=True, return_tensors="pt")
    for i in range(0, len(lines), 64)
)
rows = capture(
    AutoModel.from_pretrained(model), "encoder.layer.3", batches, out,
    skip_tokens=tokenizer.all_special_ids,
)  # fmt: skip
print(f"{rows} tokens of {len(lines)} lines")
