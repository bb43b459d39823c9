"""The hash of a model: what changes it, what does not, and models whose weights lie elsewhere or in other forms."""

import copy
from itertools import combinations

import accelerate
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.model import fingerprint
from forvalue_callbacks.model.fingerprint import CHUNK, hash_weights
from helpers.models import build_model, build_rows

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.complex64, torch.bool]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hash_of(tensor, name="w"):
    module = nn.Module()
    module.register_buffer(name, tensor)
    return hash_weights(module)


def integers(tensor):
    return tensor.view(INTEGERS[tensor.element_size()])


def square(dtype, side):
    torch.manual_seed(0)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(side, side, dtype=torch.complex64 if dtype.is_complex else torch.float64).to(dtype)
    return torch.randint(2 if dtype == torch.bool else 100, (side, side)).to(dtype)


# ---- what changes it ----


def negated(w):
    w.copy_(~w if w.dtype == torch.bool else -w)


def two_rows_negated(w):
    negated(w[3:5])


def four_corners(w):
    """Sums of the bits over every row and every column stay."""
    bits = integers(w)
    for row, column, step in ((1, 2, 1), (1, 7, -1), (5, 2, -1), (5, 7, 1)):
        bits[row, column] += step


def transposed(w):
    w.copy_(w.T.clone())


def rows_swapped(w):
    w[:2] = w[:2].flip(0)


def rows_in_another_order(w):
    w.copy_(w.roll(1, 0))


def columns_swapped(w):
    w[:, :2] = w[:, :2].flip(1)


def columns_in_another_order(w):
    w.copy_(w.flip(1))


def chunks_swapped(w):
    flat, n = w.view(-1), 4 * CHUNK // w.element_size()
    flat[: 2 * n] = torch.cat([flat[n : 2 * n], flat[:n]])


def chunks_in_another_order(w):
    w.view(-1).copy_(w.view(-1).roll(4 * CHUNK // w.element_size()))


def the_last_value(w):
    integers(w)[-1, -1] ^= 1


CHANGES = [negated, two_rows_negated, four_corners, transposed, rows_swapped, rows_in_another_order, columns_swapped]
CHANGES += [columns_in_another_order, chunks_swapped, chunks_in_another_order, the_last_value]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_change_of_a_matrix_changes_the_hash_and_each_in_its_own_way(dtype):
    """Two and a half chunks and more; of even size, so that sign bits cancel in sums of any kind."""
    w = square(dtype, 600 if dtype.itemsize < 4 else 300)
    assert w.nbytes > 8 * CHUNK
    hashes = {"none": hash_of(w.clone())}
    for change in CHANGES:
        if change is four_corners and dtype == torch.bool:
            continue
        changed = w.clone()
        change(changed)
        assert not torch.equal(changed, w)
        hashes[change.__name__] = hash_of(changed)
    assert len(set(hashes.values())) == len(hashes), hashes


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.bool], ids=str)
def test_every_single_bit_and_every_pair_of_top_bits_changes_the_hash(dtype):
    w = square(dtype, 6)
    hashes, n_bits = {hash_of(w)}, 8 * dtype.itemsize
    bits = integers(w)
    for row in (0, 5):
        for bit in range(n_bits):
            flip = -(1 << bit) if bit == n_bits - 1 else 1 << bit
            bits[row, 3] ^= flip
            hashes.add(hash_of(w))
            bits[row, 3] ^= flip
    top = -(1 << (n_bits - 1))
    for places in combinations(range(36), 2):
        bits.view(-1)[list(places)] ^= top
        hashes.add(hash_of(w))
        bits.view(-1)[list(places)] ^= top
    assert len(hashes) == 1 + 2 * n_bits + 36 * 35 // 2


def test_names_shapes_and_dtypes_count():
    a, b = torch.arange(6.0), torch.arange(6.0) + 1
    module = nn.Module()
    module.a, module.b = nn.Parameter(a), nn.Parameter(b)
    swapped = nn.Module()
    swapped.a, swapped.b = nn.Parameter(b), nn.Parameter(a)
    hashes = [hash_weights(module), hash_weights(swapped), hash_of(a), hash_of(a, "v"), hash_of(a.view(2, 3))]
    hashes += [hash_of(a.view(torch.int32)), hash_of(a.view(torch.bfloat16)), hash_of(torch.cat([a, torch.zeros(1)]))]
    assert len(set(hashes)) == len(hashes)


def test_every_parameter_and_persistent_buffer_counts_and_tied_ones_may():
    model = build_model("llama-tied")
    model.register_buffer("flags", torch.tensor([True, False, True]))
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    first = hash_weights(model)
    assert hash_weights(copy.deepcopy(model)) == first
    model.cache += 1
    assert hash_weights(model) == first, "what is computed anew in each process may differ between devices"
    for name in model.state_dict():
        module, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(module), leaf)
        last = integers(tensor.detach().view(torch.uint8) if tensor.dtype == torch.bool else tensor.detach()).view(-1)
        last[-1] ^= 1
        assert hash_weights(model) != first, name
        last[-1] ^= 1
    assert hash_weights(model) == first


def test_adapters_count_where_they_are_on_and_by_how_much():
    def adapted(**options):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
        return get_peft_model(build_model(), config)

    model = adapted()
    hashes = [hash_weights(build_model()), hash_weights(model), hash_weights(adapted(lora_alpha=9))]
    assert hash_weights(adapted()) == hashes[1]
    with model.disable_adapter():
        hashes.append(hash_weights(model))
    assert hash_weights(model) == hashes[1]
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight[-1, -1] += 1e-3
    hashes.append(hash_weights(model))
    model.merge_adapter()
    hashes.append(hash_weights(model))
    assert len(set(hashes)) == len(hashes)


def test_the_config_counts_but_for_what_no_forward_pass_reads():
    model = build_model("gemma2-softcap")
    first = hash_weights(model)
    model.config.use_cache, model.config.pad_token_id, model.config._name_or_path = False, 5, "elsewhere"
    assert hash_weights(model) == first
    model.config.final_logit_softcapping = 3.0
    assert hash_weights(model) != first


# ---- what does not ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_a_tensor_lies_in_memory_does_not_count(dtype):
    w = square(dtype, 33)
    assert hash_of(w.T.clone().T) == hash_of(w), "columns first"
    for n in range(1, 9):  # bytes that fill no 32-bit integer, and begin in the midst of one
        part = w.view(-1)[n : 3 * n]
        assert hash_of(part) == hash_of(part.clone())
    assert hash_of(w[:0]) != hash_of(w[:1])
    assert hash_of(w[0, 0]) == hash_of(w[0, 0].clone())


def test_the_sums_are_those_of_the_naive_formula():
    n = CHUNK * 130 + 77  # more than an accelerator takes in one operation
    x = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32)
    raw = np.random.PCG64(0).random_raw(2 * CHUNK).reshape(2, CHUNK) | np.uint64(1)
    values, want = x.numpy().astype(np.int64).astype(np.uint64), []
    for chunk in np.split(values, range(CHUNK, n, CHUNK)):
        want.append([(chunk * key[: len(chunk)]).sum() for key in raw])
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        got = fingerprint._sums(x.to(device)).cpu().numpy().astype(np.uint64)
        np.testing.assert_array_equal(got, np.array(want))


def test_the_hash_is_the_same_in_every_process_on_every_machine():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).bfloat16()
    with torch.no_grad():
        module[0].weight.copy_(torch.arange(6).view(2, 3) - 2.5)
        module[0].bias.zero_()
    assert hash_weights(module) == "d23e1fe054c39a85"


# ---- weights elsewhere, or in other forms ----


@pytest.mark.parametrize("how", ["cpu", "disk", "whole layers", "some"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_offloaded_weights_are_read_where_they_are_kept(architecture, how, tmp_path):
    model, device = build_model(architecture), torch.device("cpu")
    want = hash_weights(model)
    if how == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device=device)
    elif how == "some":
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
        places |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    else:
        layers = ["LlamaDecoderLayer"] if how == "whole layers" else None
        accelerate.cpu_offload(model, execution_device=device, preload_module_classes=layers)
    away = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert away
    assert hash_weights(model) == want
    assert [name for name, tensor in model.named_parameters() if tensor.is_meta] == away, "away again"


def test_weights_that_are_nowhere_are_refused_by_name():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"cannot read the weights of 0\.weight .*meta.* offloaded by accelerate"):
        hash_weights(module)


class Scaled(torch.Tensor):
    """A tensor of two others, as torchao's are; no operation but the one that a hash needs."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{func} of a scaled tensor")


def test_the_tensors_inside_a_tensor_count():
    values, scale = torch.arange(4, dtype=torch.int8), torch.ones(2)
    hashes = {hash_of(Scaled(v, s)) for v in (values, values + 1) for s in (scale, scale / 2, scale[:1])}
    assert len(hashes) == 6
    assert hash_of(Scaled(values.clone(), scale.clone())) == hash_of(Scaled(values, scale))


class Packed(nn.Module):
    """A weight and what is kept beside it, as bitsandbytes does; its state_dict would change it."""

    def __init__(self, where, absmax=1.0, blocksize=64):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(8, dtype=torch.uint8), requires_grad=False)
        self.state = type("State", (), {})()
        self.absmax, self.blocksize = torch.tensor([absmax]), blocksize
        if where == "quant_state":
            self.weight.quant_state = self
        else:
            (self.weight if where == "weight" else self.state).SCB = self.absmax

    def as_dict(self):
        return {"absmax": self.absmax, "blocksize": self.blocksize}

    def _save_to_state_dict(self, *_):
        raise AssertionError("state_dict")


def test_scales_beside_a_quantised_weight_count_and_state_dict_is_left_alone():
    plain = hash_weights(Packed("quant_state"))
    assert hash_weights(Packed("quant_state")) == plain
    assert len({plain, hash_weights(Packed("quant_state", 2.0)), hash_weights(Packed("quant_state", 1.0, 128))}) == 3
    assert hash_weights(Packed("weight")) == hash_weights(Packed("state")), "where it lies once a pass has been run"
    assert hash_weights(Packed("weight")) != hash_weights(Packed("weight", 2.0))


def test_sharded_tensors_are_hashed_whole():
    from torch.distributed.tensor import Shard, distribute_tensor

    want = hash_weights(build_model())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = build_model()
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for module in model.modules():
            for name, tensor in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(distribute_tensor(tensor.detach(), mesh, [Shard(0)])))
        assert hash_weights(model) == want
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["gradient", "auto"])
def test_weights_that_cannot_be_read_are_refused_before_the_first_forward_pass(method, monkeypatch):
    model = build_model()
    monkeypatch.setattr(model.model, "forward", lambda *_, **__: pytest.fail("the model was run"))
    model.register_buffer("odd", torch.zeros(3, device="meta"))
    scorer = ForValueScorer(model, build_rows(5), ForValueConfig(method=method), progress=False)
    with pytest.raises(ValueError, match="cannot read the weights of odd"):
        scorer.score(build_rows(3))
