"""What other code does to a sparse layer's index and values: the right result, or an error before any kernel reads."""

import copy
import gc
import io
import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import sparse_moon as sm
from small_mlp import gradients, mlp, train
from sparse_moon.ops.check_index import check_index_reference
from sparse_moon.ops.native import native
from sparse_moon.ops.product import plan_of
from sparse_moon.topology import build_index

# --- the check itself


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 4), (1, 9), (9, 1), (6, 0), (0, 6)])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_check_finds_every_single_change(grid, density):
    count = round(density * grid[0] * grid[1])
    index = build_index(torch.randperm(grid[0] * grid[1])[:count].sort().values, grid)
    check = torch.ops.sparse_moon.check_index
    sound = check(*index)
    assert sound[0] == 0 and torch.equal(sound, check_index_reference(*index))
    for number in range(5):
        for place in range(index[number].numel()):
            for value in (-1, 0, 1, 3, 1 << 30, -(1 << 31), int(index[number][place]) + 1):
                changed = [t.clone() for t in index]
                changed[number][place] = value
                found = check(*changed)
                assert torch.equal(found, check_index_reference(*changed))
                same = torch.equal(changed[number], index[number])
                assert same == (found.tolist() == sound.tolist())


def test_fingerprints_differ():
    seen = set()
    for count in (1, 2, 3):
        for positions in torch.combinations(torch.arange(12), count):
            seen.add(int(torch.ops.sparse_moon.check_index(*build_index(positions, (3, 4)))[1]))
    assert len(seen) == 12 + 66 + 220


@pytest.mark.parametrize("number", range(5))
def test_operators_refuse_a_damaged_index(number):
    layer = sm.SparseLinear(16, 12, sparsity=0.5)
    index = [t.clone() for t in layer.topology.index]
    index[number][index[number].numel() // 2] = 1 << 29
    x = torch.randn(3, 16)
    with pytest.raises(ValueError, match="the index is damaged"):
        torch.ops.sparse_moon.sparse_linear(x, layer.values, None, None, *index)
    with pytest.raises(ValueError, match="index tensors have sizes"):
        torch.ops.sparse_moon.sparse_linear(x, layer.values, None, None, *index[:4], index[4][:-1])
    with pytest.raises(ValueError, match="values"):
        torch.ops.sparse_moon.sparse_linear(x, layer.values[:-3], None, None, *layer.topology.index)


def test_operators_look_again_at_an_index_whose_memory_was_exchanged():
    layer = sm.SparseLinear(16, 12, sparsity=0.5)
    index, x = [t.clone() for t in layer.topology.index], torch.randn(3, 16)
    torch.ops.sparse_moon.sparse_linear(x, layer.values, None, None, *index)
    index[1].data = torch.full_like(index[1], 1 << 29)  # counts as no write
    with pytest.raises(ValueError, match="the index is damaged"):
        torch.ops.sparse_moon.sparse_linear(x, layer.values, None, None, *index)


def test_operators_keep_a_plan_as_long_as_the_index_is_the_same():
    layer = sm.SparseLinear(16, 12, sparsity=0.5)
    index, block = [t.clone() for t in layer.topology.index], layer.topology.block
    plan = plan_of(tuple(index), block)
    assert plan_of(tuple(index), block) is plan
    geometry = ((12, 4, 2, 2), (1, 1), (0, 0), (1, 1), 1)
    assert plan_of((*geometry, *index), block).geometry and plan_of(tuple(index), block) is plan
    torch.save(index[1], file := io.BytesIO())
    file.seek(0)
    for copied in (copy.deepcopy(index[1]), torch.load(file, weights_only=True)):
        own = plan_of((index[0], copied, *index[2:]), block)
        assert own is not plan and own.index[1] is copied
    del copied, own
    index[1].add_(0)
    assert plan_of(tuple(index), block) is not plan
    col = weakref.ref(index[1])
    del index, plan
    gc.collect()
    assert col() is None


def test_a_compiled_model_refuses_a_damaged_index():
    model = mlp()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64)
    torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        model[0].topology.col[3] += 1 << 28
    with pytest.raises(ValueError, match="the index is damaged"):
        compiled(x)


WORKER = """
import sys, tempfile, os, torch, torch.distributed as dist, sparse_moon as sm
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
model = torch.nn.Sequential(sm.SparseLinear(512, 512, sparsity=0.9))
run, x = DistributedDataParallel(model), torch.randn(8, 512)
for _ in range(3): run(x).sum().backward()
with torch.no_grad(): model[0].topology.col.fill_(1 << 29)
try: run(x); print("ran")
except RuntimeError as error: print("raised", "was changed by other code" in str(error))
sys.stdout.flush(); os._exit(0)
"""


def test_a_damaged_index_is_found_in_a_parallel_model():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WORKER], capture_output=True, text=True)
    assert done.stdout.strip() == "raised True", done.stderr


def test_a_damaged_index_is_found_in_inference_mode():
    with torch.inference_mode():
        layer, x = sm.SparseLinear(512, 512, sparsity=0.9), torch.randn(8, 512)
        layer(x)
        layer.topology.col.fill_(1 << 29)
        with pytest.raises(RuntimeError, match="was changed by other code"):
            layer(x)


WRITES = {
    "rows": lambda w: w[3:].zero_(),
    "columns": lambda w: w[:, 3:].zero_(),
    "iteration": lambda w: [row.zero_() for row in w],
    "chunk": lambda w: w.chunk(2)[0].zero_(),
    "narrow": lambda w: torch.narrow(w, 0, 3, 2).zero_(),
    "relu": lambda w: nn.functional.relu(w, inplace=True),
    "foreach": lambda w: torch._foreach_mul_([w], 0.5),
    "out": lambda w: torch.mul(torch.ones(48, 64), 2, out=w),
    "init": nn.init.kaiming_normal_,
    "data": lambda w: w.data.normal_(),
    "item": lambda w: w.__setitem__(0, 1.0),
    "add": lambda w: w.__iadd__(1.0),
    "freeze": lambda w: w.requires_grad_(False),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writing_to_the_weight_is_an_error(write):
    layer = mlp()[0]
    with torch.no_grad(), pytest.raises(RuntimeError, match="write to values"):
        write(layer.weight)


def test_the_weight_can_be_read_in_every_way(tmp_path):
    layer = mlp()[0]
    expected = layer.dense_weight().detach()
    assert torch.equal(layer.weight.detach().cpu().clone(), expected) and layer.weight.shape == (48, 64)
    assert (
        torch.equal(layer.weight.data * 2, expected * 2) and (layer.weight.detach().numpy() == expected.numpy()).all()
    )
    torch.save(layer.weight.detach(), tmp_path / "w.pt")
    for read in (torch.load(tmp_path / "w.pt"), copy.deepcopy(layer.weight.detach())):
        assert type(read) is torch.Tensor and torch.equal(read, expected)
    with pytest.raises(AttributeError, match="cannot be assigned"):
        layer.weight = nn.Parameter(expected)
    with pytest.raises(AttributeError, match="cannot be assigned"):
        layer.weight = expected


# --- layers made without memory


@pytest.mark.parametrize("pattern", ["unstructured", "block4"])
def test_memory_that_nobody_wrote_never_reaches_a_kernel(pattern):
    code = f"""
import torch, sparse_moon as sm
with torch.device("meta"):
    m = sm.sparsify(torch.nn.Sequential(torch.nn.Conv2d(4, 64, 3), torch.nn.Flatten(), torch.nn.Linear(256, 200)), 0.9,
                    pattern={pattern!r}, first_dense=False)
junk = [torch.full((5000,), 2**30, dtype=torch.int32) for _ in range(50)]; del junk
m.to_empty(device="cpu")
[l.reset_parameters() for l in (m[0], m[2])]
for call in (lambda: m(torch.randn(4, 4, 4, 4)), lambda: m[2].dense_weight(), lambda: m[2].weight):
    try: call(); print("ran")
    except RuntimeError as error: print("raised", "load_state_dict" in str(error))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:3] == ["raised True"] * 3, done.stderr


def test_a_layer_from_the_meta_device_works_once_loaded():
    whole = mlp()
    with torch.device("meta"):
        model = mlp()
    model.to_empty(device="cpu")
    model.load_state_dict(whole.state_dict())
    x = torch.randn(3, 64)
    for ours, theirs in zip(gradients(model, x), gradients(whole, x), strict=True):
        assert torch.equal(ours, theirs)
    with torch.device("meta"):
        model = mlp()
    model.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(model(x), whole(x))
    assert model[0].topology.col.data_ptr() != whole[0].topology.t_row.data_ptr()


# --- loading of every kind


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("resized", [False, True])
def test_loading_leaves_a_consistent_topology(assign, inference, resized):
    source = mlp(0.7 if resized else 0.8)
    train(source)
    state, model, x = source.state_dict(), mlp(), torch.randn(3, 64)
    model(x).sum().backward()
    state = copy.deepcopy(state)
    with torch.inference_mode(inference):
        model.load_state_dict(state, assign=assign)
    for ours, theirs in zip(gradients(model, x), gradients(source, x), strict=True):
        assert torch.equal(ours, theirs)
    train(model)  # goes on
    for layer in sm.sparse_layers(model).values():
        assert int(torch.ops.sparse_moon.check_index(*layer.topology.index)[0]) == 0
    assert torch.equal(source(x), source(x))
    source(x)  # whose index is its own


def test_a_load_that_is_refused_leaves_the_layer_alone():
    model, other, x = mlp(), mlp(), torch.randn(3, 64)
    state, before = copy.deepcopy(other.state_dict()), model[0].dense_weight().clone()
    state["0.topology.row_ptr"][1] = -1
    with pytest.raises(RuntimeError, match="damaged"):
        model.load_state_dict(state)
    assert torch.equal(model[0].dense_weight(), before)
    model(x)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_an_in_place_load_is_refused_until_it_is_finished(tmp_path):
    source, model, x = mlp(), mlp(), torch.randn(3, 64)
    dcp.save(source.state_dict(), checkpoint_id=tmp_path)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    with pytest.raises(RuntimeError, match="load_state_dict"):
        model(x)
    model.load_state_dict(state)
    for ours, theirs in zip(gradients(model, x), gradients(source, x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("key", ["values", "topology.row_ptr", "topology.col"])
def test_a_part_of_a_sparse_layer_does_not_load(key):
    source, model = mlp(), mlp()
    part = {name: t for name, t in source.state_dict().items() if not name.endswith(key)}
    with pytest.raises(RuntimeError, match="must come together"):
        model.load_state_dict(part, strict=False)
    only = {name: t for name, t in source.state_dict().items() if name.endswith(key)}
    with pytest.raises(RuntimeError, match="must come together"):
        model.load_state_dict(only, strict=False)
    model.load_state_dict({"0.bias": torch.zeros(48)}, strict=False)
    assert not model[0].bias.any()


def test_indices_that_are_no_integers_do_not_load():
    layer = sm.SparseLinear(4, 1, sparsity=0.75)
    for bad in (torch.tensor([float("nan")]), torch.tensor([1.0]), torch.tensor(1), torch.tensor([[1]])):
        with pytest.raises(RuntimeError, match=r"damaged|size mismatch"):
            layer.load_state_dict({**layer.state_dict(), "topology.col": bad})
    layer.load_state_dict({**layer.state_dict(), "topology.col": torch.tensor([2])})  # int64 is as good
    assert layer.topology.col.dtype == torch.int32 and layer.mask().nonzero().tolist() == [[0, 2]]


def test_a_model_survives_being_moved_pickled_and_shared(tmp_path):
    model, x = mlp(), torch.randn(3, 64)
    train(model)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), model.share_memory(), model.float()):
        assert torch.equal(other(x), expected)
    assert torch.equal(model.double().float()(x), expected)
    with torch.inference_mode():
        made = mlp()
        made(x)
        assert torch.equal(model(x), expected)


# --- graphs that are older than a change of the number of weights


def resized(layer):
    index = build_index(torch.arange(3), layer.topology.grid)
    layer.replace_(index, torch.ones(3, *layer.values.shape[1:], dtype=layer.values.dtype))


@pytest.mark.parametrize("read", ["call", "weight", "dense_weight", "masked"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_graph_older_than_a_resize_raises(kind, read):
    layer = sm.SparseLinear(64, 64, sparsity=0.9) if kind == "linear" else sm.SparseConv2d(64, 64, 3, sparsity=0.9)
    x = torch.randn(8, 64) if kind == "linear" else torch.randn(2, 64, 9, 9)
    if read == "masked":
        sm.RandomMask(layer, 0.5).draw()
    loss = (
        layer(x) if read in ("call", "masked") else getattr(layer, read)() if read == "dense_weight" else layer.weight
    ).sum()
    loss.backward(retain_graph=True)
    layer.hide = None
    resized(layer)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        loss.backward()
    assert layer.values.grad is None
    layer(x).sum().backward()
    assert layer.values.grad.shape == (3,)


@pytest.mark.parametrize("read", ["call", "weight", "dense_weight"])
def test_a_graph_older_than_an_exchange_raises(read):
    layer = sm.SparseLinear(64, 64, sparsity=0.9)
    reads = {"weight": lambda: layer.weight, "dense_weight": layer.dense_weight}
    loss = reads.get(read, lambda: layer(torch.randn(8, 64)))().sum()
    index = build_index(torch.randperm(64 * 64)[: layer.topology.nnz].sort().values, layer.topology.grid)
    layer.replace_(index, layer.values.detach().clone())
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("kind", ["mest", "gmp", "top-kast"])
def test_methods_that_resize_leave_no_old_graph_usable(kind):
    model = nn.Sequential(*[sm.SparseConv2d(16, 16, 3, padding=1, sparsity=0.5) for _ in range(2)])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    method = {
        "mest": lambda: sm.MEST(model, optimizer, total_steps=20, interval=2, stop=1.0, soft_memory_bound=True),
        "gmp": lambda: sm.GMP(model, optimizer, total_steps=20, interval=2, densities=0.1),
        "top-kast": lambda: sm.TopKAST(model, optimizer, total_steps=7, interval=2),
    }[kind]()
    x, sizes = torch.randn(4, 16, 8, 8), {model[0].topology.nnz}
    losses = []
    for _ in range(8):
        loss = model(x).square().mean()
        losses.append(loss)
        loss.backward(retain_graph=True)
        method.step()
        optimizer.zero_grad()
        sizes.add(model[0].topology.nnz)
    assert len(sizes) > 1
    for loss in losses[:-1]:
        with pytest.raises(RuntimeError):
            loss.backward()
    optimizer.zero_grad()
    for _ in range(20):
        model(x).sum().backward()
    assert model[0].values.grad.shape == model[0].values.shape


# --- what a kernel cannot take


@pytest.mark.parametrize("kind", ["features", "outputs", "plane"])
def test_what_a_kernel_cannot_take_goes_to_the_dense_product(kind):
    if kind == "plane":
        # A panel of all channels, one lane of a vector an image, is of more than 2^31 bytes.
        lanes = {"avx512": 16, "avx2": 8}.get(native.isa(), 4)
        layer, x = sm.SparseConv2d(256, 2, (1, 9), sparsity=0.99), torch.randn(1, 256, 1, 2_880_000 // lanes)
    else:
        sizes = (1_500_000, 3) if kind == "features" else (3, 1_500_000)
        layer, x = sm.SparseLinear(*sizes, sparsity=0.99), torch.randn(2, sizes[0])
    x.requires_grad_()
    output = layer(x)
    assert output.shape[1] == layer.weight_shape[0]
    output.sum().backward()
    assert x.grad.shape == x.shape and layer.values.grad.shape == layer.values.shape
    with sm.ops.use_backend("kernel"), pytest.raises(ValueError, match="CPU kernels"):
        layer(x)


def test_indices_of_more_than_32_bits_are_refused():
    with pytest.raises(ValueError, match="indices have 32 bits"):
        sm.Topology(torch.empty(0, dtype=torch.int64), (2**31, 1))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("shape", [(3, 2, 0), (0,), (2, 0, 0), (0, 4, 0)])
def test_inputs_of_no_features(shape):
    layer, dense = sm.SparseLinear(0, 5, sparsity=0.5), nn.Linear(0, 5)
    with torch.no_grad():
        layer.bias.copy_(dense.bias)
    for module in (layer, dense):
        x = torch.ones(shape, requires_grad=True)
        module(x).sum().backward()
        assert x.grad.shape == shape
    assert torch.equal(layer(torch.ones(shape)), dense(torch.ones(shape)))
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
