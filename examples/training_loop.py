"""A training loop of one's own: python training_loop.py tokens.h5 weights.safetensors"""

import sys

import safetensors.torch

from sparsekern.data import ActivationStore
from sparsekern.models import SparseAutoencoder
from sparsekern.optim import Adam

store = ActivationStore(sys.argv[1])
model = SparseAutoencoder(
    store.features, 8 * store.features, k=4, auxk=4, dead_after=store.tokens // 4
)
model.initialize(next(store.batches(min(4096, store.tokens), seed=1)))
rest = [model.encoder, model.encoder_bias, model.decoder_bias]
optimizer = Adam([{"params": [model.dictionary], "unit_rows": True}, {"params": rest}], lr=1e-3)
for epoch in range(2):
    for x in store.batches(512, seed=0, epoch=epoch):
        output, loss = model.loss(x)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    print(f"epoch {epoch}: FVU {loss.fvu:.3f}, {model.counter.fraction(store.tokens):.0%} dead")
safetensors.torch.save_model(model, sys.argv[2])
