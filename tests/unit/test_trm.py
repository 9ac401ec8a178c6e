import pytest
import torch

from tests.unit.reference_trm import Reference, loss
from trm_dist.model.losses import score_rows
from trm_dist.model.trm import Shape, Trm, num_parameters

SMALL = {
    "dim": 12, "depth": 2, "heads": 3, "seq_len": 5, "prefix_len": 0, "num_tokens": 7,
    "expansion": 2.0, "h_cycles": 3, "l_cycles": 2,
}  # fmt: skip


def shape(**changed: object) -> Shape:
    return Shape(**(SMALL | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("net", "seq_len", "num_tokens", "count"),
    [
        ("mlp", 81, 11, 5_028_866),
        ("attn", 81, 11, 6_828_034),
        ("mlp", 900, 6, 18_795_522),
        ("attn", 900, 6, 6_822_914),
    ],
)
def test_papers_models_have_exactly_its_parameters(
    net: str, seq_len: int, num_tokens: int, count: int
) -> None:
    sizes = shape(
        net=net, dim=512, heads=8, seq_len=seq_len, prefix_len=16, num_tokens=num_tokens,
        expansion=4.0,
    )  # fmt: skip
    with torch.device("meta"):
        assert num_parameters(Trm(sizes, seed=0)) == count


@pytest.mark.parametrize("name", ["stablemax", "softmax"])
@pytest.mark.parametrize("prefix_len", [0, 3])
@pytest.mark.parametrize("net", ["mlp", "attn"])
def test_model_agrees_with_the_reference_forward_and_backward(
    net: str, prefix_len: int, name: str
) -> None:
    model = Trm(shape(net=net, prefix_len=prefix_len), seed=3).double()
    torch.nn.init.normal_(model.halt_head.weight)
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    reference = Reference(weights, net, 2, 3, prefix_len, rounds=3, thoughts=2)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(7, (4, 5), generator=generator)
    labels = torch.randint(7, (4, 5), generator=generator)
    labels[0, 2:] = -100
    y, z = model.start(4)

    ours = model(tokens, y, z)
    theirs = reference.deep_recursion(tokens, y.clone(), z.clone())
    score_rows(ours[0], ours[1], labels, name).loss.sum().backward()  # type: ignore[arg-type]
    loss(theirs[0], theirs[1], labels, name).backward()

    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-10)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[key].grad, rtol=1e-8, atol=1e-10)


def test_carry_has_no_gradient_and_starts_from_stored_vectors() -> None:
    model = Trm(shape(net="mlp"), seed=0)
    y, z = model.start(2)
    *_, output, latent = model(torch.zeros(2, 5, dtype=torch.int64), y, z)
    assert not output.requires_grad
    assert not latent.requires_grad
    assert {"output_init", "latent_init"} <= model.state_dict().keys()
    assert torch.equal(y[1, 3], model.output_init)
    assert torch.equal(z[1, 3], model.latent_init)


def test_weights_are_a_function_of_the_seed() -> None:
    one, same, other = (Trm(shape(net="attn"), seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["embedding"], other["embedding"])


def test_nothing_halts_before_it_has_learned_when() -> None:
    model = Trm(shape(net="mlp"), seed=0)
    _, halt, *_ = model(torch.zeros(2, 5, dtype=torch.int64), *model.start(2))
    assert halt.tolist() == [-5.0, -5.0]


@pytest.mark.parametrize("net", ["mlp", "attn"])
def test_bf16_is_for_activations_and_close_to_fp32(net: str) -> None:
    sizes = shape(net=net, dim=48, heads=4)
    exact, narrow = Trm(sizes, seed=2), Trm(sizes, seed=2, precision="bf16")
    tokens = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(4))
    found = {}
    for name, model in (("fp32", exact), ("bf16", narrow)):
        logits, halt, output, latent = model(tokens, *model.start(6))
        score_rows(logits, halt, tokens, "stablemax").loss.sum().backward()
        found[name] = logits
        assert logits.dtype == halt.dtype == torch.float32
        wanted = torch.bfloat16 if name == "bf16" else torch.float32
        assert output.dtype == latent.dtype == wanted
        for parameter in model.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.grad is None or parameter.grad.dtype == torch.float32
    assert not torch.equal(found["fp32"], found["bf16"])
    difference = (found["bf16"] - found["fp32"]).norm() / found["fp32"].norm()
    assert difference < 0.15
    gradients = zip(exact.parameters(), narrow.parameters(), strict=True)
    for one, other in gradients:
        if one.grad is not None and one.grad.norm() > 0:
            cosine = torch.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0)
            assert cosine > 0.95


@pytest.mark.parametrize("is_recording", [True, False])
@pytest.mark.parametrize(
    "prefix", [{}, {"prefix_len": 2}, {"prefix_len": 2, "puzzle_emb_ndim": 20}]
)
def test_bf16_mixer_keeps_positions_first_in_memory(
    prefix: dict[str, int], is_recording: bool
) -> None:
    model = Trm(shape(net="mlp", **prefix), seed=0, precision="bf16")
    tokens = torch.zeros(4, 5, dtype=torch.int64)
    seen: list[bool] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, x: seen.append(x[0].is_contiguous()))
    carried = model.start(4)

    with torch.set_grad_enabled(is_recording):
        for _ in range(2):
            _, _, *carried = model(tokens, *carried, model.vectors_of(None, 4))

    assert len(seen) == 2 * 3 * 3 * 2
    assert all(seen)
    assert all(each.transpose(0, 1).is_contiguous() for each in carried)
