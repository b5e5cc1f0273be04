"""Processes that share out the latents of one dictionary, beside one process.

Where all sums are exact in float32 (weights, rows and upstream gradients are small integers) codes,
reconstructions, gradients, thresholds and counts must be those of one process bit for bit.
"""

from __future__ import annotations

import copy
import datetime
import inspect
import json
import pickle
import traceback
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import run_together
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from sparsekern import BatchTopK, JumpReLU, TopK
from sparsekern.distributed import ShardedAutoencoder, collectives, count_traffic
from sparsekern.distributed.layout import Layout
from sparsekern.distributed.state import gather_value
from sparsekern.models import SparseAutoencoder
from sparsekern.optim import Adam

D, N, B = 16, 240, 12
# Meshes: processes along data and along latents. Each reads checkpoints of those before it.
SMALL_MESH, MESHES = (1, 2), ((2, 2), (2, 1), (1, 1), (1, 3), (1, 4))
# After which a process gives up waiting for one whose check has failed.
TIMEOUT = datetime.timedelta(seconds=60)
MODELS = {
    "TopK": lambda: {"k": 7},
    "k above the latents of a process": lambda: {"k": 200},
    "groups": lambda: {"activation": TopK(8, groups=2)},
    "tied": lambda: {"k": 7, "tied": True},
    "bias not subtracted": lambda: {"k": 7, "subtract_bias": False},
    "prefixes": lambda: {"k": 9, "prefixes": (3, 20, 100)},
    "dead latents": lambda: {"k": 7, "auxk": 5, "multi_k": 20},
    "more auxk than dead latents": lambda: {"k": 7, "auxk": 100},
    "BatchTopK": lambda: {"activation": BatchTopK(5), "auxk": 5},
    "BatchTopK of fractions": lambda: {"activation": BatchTopK(2.7), "prefixes": (10, 50)},
    "dense BatchTopK": lambda: {"activation": BatchTopK(100)},
    "JumpReLU": lambda: {"activation": JumpReLU(N, threshold=9.0), "auxk": 5},
    "dense JumpReLU": lambda: {"activation": JumpReLU(N, threshold=2.0), "target_l0": 9},
    "ReLU": lambda: {"activation": torch.nn.ReLU(), "sparsity_weight": 0.1, "prefixes": (10,)},
}
ROUNDED = {
    "scores scaled": lambda: {"k": 7, "scale_scores": True},
    "rows normalized": lambda: {"k": 7, "normalize_rows": True, "prefixes": (9,)},
}


def _integers(*shape, seed=3):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def _pair(mesh, options, seed=0):
    """A model in one process, and in those of the mesh; with weights of integers."""
    one = SparseAutoencoder(D, N, **options())
    sharded = ShardedAutoencoder(D, N, mesh=mesh, **options())
    with torch.no_grad():
        for number, parameter in enumerate(one.parameters()):
            if "log_threshold" not in dict(one.named_parameters()) or parameter.numel() != N:
                parameter.copy_(_integers(*parameter.shape, seed=seed + number))
    one.dead_after = sharded.dead_after = 50
    one.counter.rows_since_fired.copy_((torch.arange(N) % 3 == 0) * 100)
    sharded.load_state_dict(one.state_dict())
    return one, sharded


def _own_rows(mesh, x):
    """Of the rows of a batch, those of this process."""
    names = mesh.mesh_dim_names
    if "data" not in names:
        return x
    return x.chunk(mesh["data"].size())[mesh.get_local_rank("data")]


def _gradients(model):
    gradients = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            gradients[name] = gather_value(grad)
    return gradients


def _codes_as_matrix(codes):
    return torch.zeros(*codes.values.shape[:-1], N).scatter_add(-1, codes.indices, codes.values)


def first_weights_are_those_of_one_process(mesh):
    for options in ({}, {"tied": True}):
        torch.manual_seed(1)
        one = SparseAutoencoder(37, 130, k=3, **options)
        torch.manual_seed(1)
        sharded = ShardedAutoencoder(37, 130, k=3, mesh=mesh, **options)
        torch.testing.assert_close(
            dict(sharded.gather().state_dict()), dict(one.state_dict()), rtol=0, atol=0
        )
        assert torch.equal(torch.rand(1), torch.rand(1, generator=_advanced(one))), "generators"


def _advanced(model):
    """A generator in the state that making a model in one process leaves, and one number on."""
    generator = torch.Generator().manual_seed(1)
    torch.randn(model.dictionary.shape, generator=generator)
    return generator


def integers_give_equal_bits(mesh):
    x, upstream = _integers(B, D), _integers(B, D, seed=9)
    own_x, own_upstream = _own_rows(mesh, x), _own_rows(mesh, upstream)
    for name, options in MODELS.items():
        for training in (True, False):
            one, sharded = (m.train(training) for m in _pair(mesh, options))
            for model in (one, sharded):
                if isinstance(model.activation, BatchTopK):
                    model.activation.threshold.fill_(20.0)
            whole, prefixes = one.reconstruct(x)
            part, own_prefixes = sharded.reconstruct(own_x)
            for expected, actual in zip(
                (whole.reconstruction, *prefixes), (part.reconstruction, *own_prefixes), strict=True
            ):
                assert torch.equal(actual, _own_rows(mesh, expected)), (name, training)
            weighted = sum((y * upstream).sum() for y in (whole.reconstruction, *prefixes))
            weighted.backward()
            own = sum((y * own_upstream).sum() for y in (part.reconstruction, *own_prefixes))
            sharded.shards.data.total(own).backward()
            expected = _gradients(one)
            assert expected.keys() == _gradients(sharded).keys()
            for parameter, grad in _gradients(sharded).items():
                if "threshold" in parameter and sharded.shards.data.size > 1:  # no integers
                    torch.testing.assert_close(grad, expected[parameter])
                else:
                    assert torch.equal(grad, expected[parameter]), (name, training, parameter)
            gathered = sharded.gather().state_dict()
            for key, value in one.state_dict().items():
                assert torch.equal(gathered[key], value), (name, training, key)


def a_process_without_a_code(mesh):
    """All that is selected lies in one process."""
    for options in ({"k": 3, "prefixes": (2, 100)}, {"activation": BatchTopK(2), "prefixes": (9,)}):
        one, sharded = _pair(mesh, lambda options=options: dict(options))
        for model in (one, sharded):
            with torch.no_grad():
                model.encoder.zero_()
        with torch.no_grad():
            one.encoder_bias.copy_(torch.arange(N) % 64 == 0)
        sharded.load_state_dict(one.state_dict())
        x = _integers(B, D)
        expected, actual = one.loss(x)[1], sharded.loss(_own_rows(mesh, x))[1]
        torch.testing.assert_close(actual, expected)
        actual.total.backward()


def losses_and_their_gradients(mesh):
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for name, options in {**MODELS, **ROUNDED}.items():
        one, sharded = _pair(mesh, options)
        own_x = _own_rows(mesh, x).detach().requires_grad_()
        expected, actual = one.loss(x)[1], sharded.loss(own_x)[1]
        expected.total.backward()
        actual.total.backward()
        _assert_close(own_x.grad, _own_rows(mesh, x.grad), name)
        x.grad = None
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")
        gradients = _gradients(sharded)
        for parameter, grad in _gradients(one).items():
            _assert_close(gradients[parameter], grad, f"{name}, {parameter}")


def a_process_without_rows(mesh):
    """All rows are those of the first process along data."""
    x = _integers(B, D)
    for options in ({"activation": BatchTopK(2)}, {"k": 3, "auxk": 5}):
        one, sharded = _pair(mesh, lambda options=options: dict(options))
        first = "data" not in mesh.mesh_dim_names or mesh.get_local_rank("data") == 0
        expected, actual = one.loss(x)[1], sharded.loss(x if first else x[:0])[1]
        expected.total.backward()
        actual.total.backward()
        torch.testing.assert_close(actual, expected)
        gradients = _gradients(sharded)
        for parameter, grad in _gradients(one).items():
            _assert_close(gradients[parameter], grad, parameter)
        gathered = sharded.gather().state_dict()
        for key, value in one.state_dict().items():
            assert torch.equal(gathered[key], value), key


def one_row_takes_all_of_a_batch(mesh):
    """No cap on the codes of a row, nor on those of a process."""
    one, sharded = _pair(mesh, lambda: {"activation": BatchTopK(2)})
    x = torch.zeros(B, D)
    x[-1] = 100 * _integers(1, D)[0]
    whole, part = one(x), sharded(_own_rows(mesh, x))
    assert int((whole.values[-1] > 0).sum()) == 2 * B, "all in the last row"
    assert torch.equal(part.reconstruction, _own_rows(mesh, whole.reconstruction))
    assert torch.equal(sharded.activation.threshold, one.activation.threshold)


def _assert_close(actual, expected, name):
    """Close, where numbers of the size of the largest were added up."""
    torch.testing.assert_close(
        actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()),
        msg=lambda text: f"{name}: {text}",
    )  # fmt: skip


def codes_of_all_latents(mesh):
    x = _integers(2, B // 2, D) if mesh.size() < 5 else None
    for name, options in MODELS.items():
        one, sharded = (m.eval() for m in _pair(mesh, options))
        for model in (one, sharded):
            if isinstance(model.activation, BatchTopK):
                model.activation.threshold.fill_(20.0)
        for arguments in ((), (5,)):
            expected, actual = one.encode(x, *arguments), sharded.encode(x, *arguments)
            assert torch.equal(_codes_as_matrix(actual), _codes_as_matrix(expected)), name
            if arguments or isinstance(one.activation, TopK):
                assert torch.equal(actual.indices, expected.indices), name
            else:
                assert bool((actual.values.diff(dim=-1) <= 0).all()), "largest first"
            assert torch.equal(sharded.decode(*actual), one.decode(*actual)), name
        output = sharded(x)
        matrix = _codes_as_matrix(output)
        torch.distributed.all_reduce(matrix, group=mesh["latents"].get_group())
        assert torch.equal(matrix, _codes_as_matrix(one(x)).expand_as(matrix)), name


def steps_of_optimizers(mesh):
    batches = torch.randn(4, B, D, generator=torch.Generator().manual_seed(0))
    makers = {
        "Adam": lambda m: Adam([
            {"params": [m.dictionary], "unit_rows": True},
            {"params": [p for n, p in m.named_parameters() if n != "dictionary"]},
        ], lr=1e-2),
        "torch": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    }  # fmt: skip
    for name, make in makers.items():
        models = [SparseAutoencoder(D, N, k=7, auxk=4, dead_after=20)]
        models.append(ShardedAutoencoder.from_model(models[0], mesh))
        norms = []
        for model in models:
            optimizer = make(model)
            for batch in batches:
                optimizer.zero_grad()
                rows = batch if model is models[0] else _own_rows(mesh, batch)
                model.loss(rows)[1].total.backward()
                model.remove_parallel_gradient()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
                norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
                optimizer.step()
                model.normalize_dictionary()
        torch.testing.assert_close(norms[: len(batches)], norms[len(batches) :])
        torch.testing.assert_close(
            dict(models[1].gather().named_parameters()), dict(models[0].named_parameters()),
            rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def first_weights_fitted_to_rows(mesh):
    rows = torch.randn(400, D, generator=torch.Generator().manual_seed(0)) + 1
    for options in (
        {"k": 7},
        {"activation": BatchTopK(7)},
        {"activation": JumpReLU(N), "target_l0": 7},
    ):
        one = SparseAutoencoder(D, N, **options)
        sharded = ShardedAutoencoder.from_model(one, mesh)
        one.initialize(rows)
        sharded.initialize(_own_rows(mesh, rows))
        for model in (one, sharded):
            model.fold_normalization(0.5)
            model.fold_bias()
            model.scale_scores = True
            model.fold_norms()
        torch.testing.assert_close(
            dict(sharded.gather().state_dict()), dict(one.state_dict()), rtol=1e-4, atol=1e-5
        )


def what_is_sent_is_what_the_page_says(mesh):
    data, latents = (mesh.size() // mesh["latents"].size(), mesh["latents"].size())
    k, rows = 7, B // data
    model = ShardedAutoencoder(D, N, k=k, mesh=mesh)
    small, collectives.GATHERED = collectives.GATHERED, rows * D * 4  # as if these were many bytes
    with count_traffic() as traffic:
        model.loss(_integers(rows, D))[1].total.backward()
    collectives.GATHERED = small
    sent = {}
    for transfer in traffic.transfers:
        if transfer.given > 64:  # not a few numbers
            sent.setdefault((transfer.kind, transfer.processes), []).append(transfer.given)
    expected = {}
    if latents > 1:
        expected["all_gather", latents] = [rows * k * (4 + 4)]
        expected["all_reduce", latents] = [rows * D * 4]
    if data > 1:
        own = model.shards.layout.own
        pieces = [own * D * 4, own * D * 4, own * 4, own * 8]
        expected.setdefault(("all_reduce", data), []).extend(pieces)
    for key, sizes in expected.items():
        for size in sizes:
            assert size in sent.get(key, []), (key, size, sent)
    if data == 1:
        share = (latents - 1) / latents
        summed = 8 * share * rows * D
        assert traffic.sent == (latents - 1) * (8 * rows * k + 4 * D + 32) + summed
    largest = max([t.given for t in traffic.transfers], default=0)
    assert largest <= max([s for sizes in expected.values() for s in sizes], default=0)


def checkpoints(mesh, folder, group):
    """Written by these processes, read by these and by those of the other meshes."""
    folder = folder / "x".join(map(str, mesh.shape))
    model = ShardedAutoencoder(D, N, mesh=mesh, activation=BatchTopK(7), auxk=4)
    optimizer = Adam(model.parameters(), lr=1e-2)
    x = _own_rows(mesh, torch.randn(B, D, generator=torch.Generator().manual_seed(0)))
    model.loss(x)[1].total.backward()
    optimizer.step()
    state, optimizer_state = get_state_dict(model, optimizer)
    everything = {"model": state, "optimizer": optimizer_state}
    dcp.save(everything, checkpoint_id=folder / "dcp", process_group=group)
    model.save_pretrained(folder / "whole")
    torch.distributed.barrier(group)
    for written in folder.parent.glob("*/dcp"):
        _compare_with_saved(mesh, written.parent, group)


def _compare_with_saved(mesh, folder, group):
    """Read a checkpoint: the model is the one in the other format."""
    model = ShardedAutoencoder(D, N, mesh=mesh, activation=BatchTopK(7), auxk=4)
    optimizer = Adam(model.parameters(), lr=1e-2)
    state, optimizer_state = get_state_dict(model, optimizer)
    everything = {"model": state, "optimizer": optimizer_state}
    dcp.load(everything, checkpoint_id=folder / "dcp", process_group=group)
    set_state_dict(
        model, optimizer, model_state_dict=everything["model"],
        optim_state_dict=everything["optimizer"],
    )  # fmt: skip
    whole = SparseAutoencoder.from_pretrained(folder / "whole")
    torch.testing.assert_close(
        dict(model.gather().state_dict()), dict(whole.state_dict()), rtol=0, atol=0
    )
    again = ShardedAutoencoder.from_model(whole, mesh)
    assert all(
        torch.equal(a.to_local(), b.to_local())
        for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    moments = [optimizer.state[p]["exp_avg_sq"].to_local() for p in model.parameters()]
    assert all(bool((m > 0).any()) for m in moments), "the optimizer's state is there"


def wrong_calls(mesh, other_mesh, group):
    latents, rank = mesh["latents"].size(), mesh.get_local_rank("latents")
    model = ShardedAutoencoder(D, N, k=7, mesh=mesh)
    if latents > 1:
        with pytest.raises(RuntimeError, match="x must be the same in all processes"):
            model.loss(_integers(B, D, seed=rank))
        with pytest.raises(RuntimeError, match="the size of x must be the same"):
            model.loss(_integers(B + rank, D))
        with pytest.raises(RuntimeError, match="k must be the same"):
            model.k = 5 + rank
            model.loss(_integers(B, D))
        with pytest.raises(RuntimeError, match=r"its mode .* must be the same"):
            model.k = 7
            model.train(rank == 0).encode(_integers(B, D))
    model.train()
    with pytest.raises(ValueError, match="for x "):
        model.loss(_integers(B, D + 1))
    with pytest.raises(RuntimeError, match="the activation must have no hooks"):
        handle = model.activation.register_forward_hook(lambda *_: None)
        model.loss(_integers(B, D))
    handle.remove()
    for transform in (torch.vmap, torch.func.grad):
        with pytest.raises(RuntimeError, match=r"not under torch.func"):
            transform(lambda x: model.loss(x)[1].total)(_integers(2, B, D))
    with pytest.raises(TypeError, match="must not be pickled"):
        pickle.dumps(model)
    with pytest.raises(ValueError, match="columns must divide 240"):
        ShardedAutoencoder(D, N, k=7, mesh=mesh, columns=7)
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got int"):
        ShardedAutoencoder(D, N, k=7, mesh=2)
    with pytest.raises(ValueError, match="mesh must have the dimension 'latents'"):
        ShardedAutoencoder(D, N, k=7, mesh=other_mesh)
    if latents > 2:
        with pytest.raises(ValueError, match="columns must be so many that"):
            ShardedAutoencoder(D, N, k=7, mesh=mesh, columns=2)
    if mesh.size() > 1:
        with pytest.raises(RuntimeError, match="not needed"):
            DistributedDataParallel(model, process_group=group)


def copies_and_empty_batches(mesh):
    model = ShardedAutoencoder(D, N, mesh=mesh, activation=BatchTopK(7), auxk=4)
    other = copy.deepcopy(model)
    x = _own_rows(mesh, _integers(B, D))
    other.loss(x)[1].total.backward()
    assert model.dictionary.grad is None and torch.equal(other(x)[0], model(x)[0])
    for activation in (TopK(3), JumpReLU(N), torch.nn.ReLU()):
        model = ShardedAutoencoder(D, N, mesh=mesh, activation=activation, prefixes=(5,))
        output, loss = model.loss(x[:0])
        assert output.reconstruction.shape == (0, D) and float(loss.fvu) == 0
        loss.total.backward()
        codes, one = model.encode(x[:0]), SparseAutoencoder(D, N, activation=activation)
        assert codes.indices.shape == codes.values.shape == one.encode(x[:0]).values.shape


def compiled_code_calls_it_as_it_is(mesh):
    model = ShardedAutoencoder(D, N, k=7, mesh=mesh)
    x = _integers(B, D)
    eager = model.loss(x)[1].total
    compiled = torch.compile(lambda x: model.loss(x)[1].total * 2, backend="eager")
    assert torch.equal(compiled(x), eager * 2)


CHECKS = (
    first_weights_are_those_of_one_process,
    integers_give_equal_bits,
    a_process_without_rows,
    one_row_takes_all_of_a_batch,
    a_process_without_a_code,
    losses_and_their_gradients,
    codes_of_all_latents,
    steps_of_optimizers,
    first_weights_fitted_to_rows,
    what_is_sent_is_what_the_page_says,
    checkpoints,
    wrong_calls,
    copies_and_empty_batches,
    compiled_code_calls_it_as_it_is,
)
NAMES = [check.__name__ for check in CHECKS]
# Where there is another mesh of as many processes, checks that take seconds are left to it.
LEFT_OUT = {(1, 4): ["losses_and_their_gradients", "steps_of_optimizers"]}


def _name(shape):
    return "data {} latents {}".format(*shape)


def _outcomes(folder, meshes):
    """What each check says in each process of each mesh: '' where it holds."""
    count = max(data * latents for data, latents in meshes)
    run_together(_main, count, count, meshes, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return _outcomes(tmp_path_factory.mktemp("processes"), [SMALL_MESH])


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory):
    return _outcomes(tmp_path_factory.mktemp("processes"), MESHES)


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 64])
def test_prefixes_are_shared_out(processes):
    """As evenly as columns are: no process has all of a Matryoshka prefix of at least V latents."""
    shares = [Layout(1 << 17, 64, processes, rank) for rank in range(processes)]
    for prefix in (64, 1000, 4096, 1 << 17):
        counts = [share.below(prefix) for share in shares]
        assert sum(counts) == prefix
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - prefix * share.width / 64) <= share.width


@pytest.mark.parametrize("name", NAMES)
def test_two_processes(two_processes, name):
    assert [of_rank[_name(SMALL_MESH)][name] for of_rank in two_processes] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "name"),
    [(shape, name) for shape in MESHES for name in NAMES if name not in LEFT_OUT.get(shape, ())],
    ids=lambda value: value if isinstance(value, str) else _name(value),
)
def test_up_to_four_processes(four_processes, shape, name):
    count = shape[0] * shape[1]
    results = [of_rank.get(_name(shape), {name: ""})[name] for of_rank in four_processes]
    assert results == [""] * len(results)
    assert sum(_name(shape) in of_rank for of_rank in four_processes) == count


def _mesh(data, latents, names=("data", "latents")):
    ranks = torch.arange(data * latents)
    return (
        DeviceMesh("cpu", ranks.view(data, latents), mesh_dim_names=names)
        if data > 1
        else DeviceMesh("cpu", ranks, mesh_dim_names=names[1:])
    )


def _main(rank, count, meshes, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=count,
        timeout=TIMEOUT,
    )  # fmt: skip
    results = {}
    for shape in meshes:
        everyone = range(shape[0] * shape[1])
        # Every process makes every group.
        available = {
            "mesh": _mesh(*shape),
            "other_mesh": _mesh(*shape, names=("data", "rows")),
            "group": torch.distributed.new_group(list(everyone), timeout=TIMEOUT),
            "folder": folder,
        }
        if rank in everyone:
            checks = [c for c in CHECKS if c.__name__ not in LEFT_OUT.get(tuple(shape), ())]
            results[_name(shape)] = {check.__name__: _said_by(check, available) for check in checks}
        torch.distributed.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def _said_by(check, available):
    """What a check raises, '' if nothing; all processes of its mesh wait for each other."""
    torch.manual_seed(0)
    arguments = {name: available[name] for name in inspect.signature(check).parameters}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(**arguments)
        return ""
    except Exception:  # reported by the test of this name
        return traceback.format_exc()
    finally:
        torch.distributed.barrier(available["group"])
