import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from workbench import data, models, training

# What each must reach on the test split; a class of clothes, or bits per character of Persuasion.
AT_LEAST = {"lenet-300-100": 0.890, "lenet-5": 0.910, "resnet-8": 0.915, "resnet-14": 0.935}
AT_MOST = {"char-transformer": 2.00}
PART = {"resnet-14": 2000, "char-transformer": 500}  # all of the test split takes a minute
PARAMETERS = {
    "lenet-300-100": 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10,
    "lenet-5": 431_080,  # Han et al. (2016) print 431 K
    "mlp-wide": 784 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 10 + 10,
}


@pytest.fixture(scope="module")
def tasks() -> dict[str, data.Task]:
    return {"fashion-mnist": data.fashion_mnist(), "austen": data.austen()}


def inputs_of(name: str) -> torch.Tensor:
    if name == "char-transformer":
        return torch.randint(0, 81, (2, 128), generator=torch.Generator().manual_seed(0))
    return torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Building


@pytest.mark.parametrize("name", models.names())
def test_build_depends_on_the_seed_only(name):
    torch.manual_seed(123)
    first = models.build(name, seed=1).state_dict()
    torch.manual_seed(456)
    again, other = (models.build(name, seed=s).state_dict() for s in (1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_build_leaves_the_callers_random_state():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    models.build("lenet-300-100")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", models.names())
def test_output_shape(name):
    output = models.build(name).eval()(inputs_of(name))
    assert output.shape == ((2, 128, 81) if name == "char-transformer" else (2, 10))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_formula(name):
    assert parameters(models.build(name)) == PARAMETERS[name]


def test_residual_networks_have_the_layers_of_their_names():
    for name, layers in (("resnet-8", 8), ("resnet-14", 14)):
        kinds = (nn.Conv2d, nn.Linear)
        counted = [
            module
            for path, module in models.build(name).named_modules()
            if isinstance(module, kinds) and "shortcut" not in path
        ]
        assert len(counted) == layers
    assert 70_000 < parameters(models.build("resnet-8")) < 90_000  # MLPerf Tiny: 78 k
    assert 690_000 < parameters(models.build("resnet-14")) < 3_000_000


def test_residual_block_without_its_branch_is_the_identity_of_positive_inputs():
    block = models.ResidualBlock(4, 4, stride=1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6)
    assert torch.allclose(block(x), x, atol=1e-6)


def test_attention_is_that_of_torch():
    width, heads = 12, 3
    ours = models.Attention(width, heads, context=9)
    theirs = nn.MultiheadAttention(width, heads, batch_first=True)
    theirs.in_proj_weight.data = ours.query_key_value.weight.data
    theirs.in_proj_bias.data = ours.query_key_value.bias.data
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(2, 7, width)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    assert torch.allclose(ours(x), theirs(x, x, x, attn_mask=mask)[0], atol=1e-5)


def test_transformer_does_not_look_ahead():
    model = models.build("char-transformer").eval()
    codes = inputs_of("char-transformer")
    changed = codes.clone()
    changed[:, 64:] = (changed[:, 64:] + 1) % 81
    before, after = model(codes), model(changed)
    assert torch.equal(before[:, :64], after[:, :64])
    assert not torch.equal(before[:, 64:], after[:, 64:])


def test_transformer_shares_its_embedding_with_the_output():
    model = models.build("char-transformer")
    assert model.head.weight is model.embedding.weight
    assert 900_000 < parameters(model) < 1_200_000


@pytest.mark.parametrize("call", [models.build, models.pretrained, models.record])
def test_unknown_name(call):
    with pytest.raises(ValueError, match=r"'resnet-50'; choose from \['lenet-300-100'"):
        call("resnet-50")


# Trained weights


@pytest.mark.parametrize("name", models.names())
def test_record_tells_how_the_weights_were_made(name):
    record = models.record(name)
    keys = {"seed", "epochs", "optimizer", "training_seconds", "metric", "test", "versions"}
    assert keys <= record.keys()
    assert record["name"] == name
    assert record["parameters"] == parameters(models.build(name))


@pytest.mark.parametrize("name", models.names())
def test_committed_accuracy_is_that_of_the_record(name, tasks):
    record = models.record(name)
    model = models.pretrained(name)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    task, near = tasks[record["task"]], 0.001
    if name in PART:
        task = replace(task, test=task.test.subset(PART[name], seed=0))
    found = training.evaluate(model, task)
    if name in PART:
        near = 4 * found.scores.double().std().item() / len(found.scores) ** 0.5
    assert found.value == pytest.approx(record["test"], abs=near)
    assert record["test"] >= AT_LEAST.get(name, 0)
    assert record["test"] <= AT_MOST.get(name, 1)


@pytest.mark.parametrize("name", models.names())
def test_stored_type_is_that_of_the_record(name):
    with safe_open(data.folder() / f"models/{name}.safetensors", "pt") as file:
        types = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    weights = {dtype for dtype in types if dtype.is_floating_point}
    assert weights == {getattr(torch, models.record(name)["stored_dtype"])}


def test_models_together_stay_under_35_mb():
    files = list((data.folder() / "models").glob("*.safetensors"))
    others = {"efficientnet_lite0_fp16", "minilm-films"}
    assert {path.stem for path in files} == {*models.names(), *others}
    assert sum(path.stat().st_size for path in files) <= 35_000_000


def test_altered_weights_are_refused(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    for name in ("SHA256SUMS", "models/lenet-300-100.safetensors"):
        (tmp_path / name).write_bytes((data.folder() / name).read_bytes())
    path = tmp_path / "models/lenet-300-100.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"lenet-300-100\.safetensors is truncated or altered"):
        models.pretrained("lenet-300-100")


def test_training_script_knows_every_network():
    command = [sys.executable, data.folder() / "models/train.py", "--help"]
    wide = {**os.environ, "COLUMNS": "200"}  # so that no name is broken over two lines
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=wide).stdout
    assert all(name in shown for name in models.names())
