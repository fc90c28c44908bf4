"""Parts of the kernel, its low-rank form and the paper's proxies, against the dense kernel."""

import pytest
import torch
import zoo
from test_norms import BENT, kernel, norms, trained, truth

import lddyn
from lddyn.engine.guard import true_float64

torch.set_num_threads(1)

CLOSE = 1e-5


def error(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


# --------------------------------------------------------------------------- parts


@pytest.mark.parametrize("name", ["untied", "tied", "bias", "soft-capped"])
def test_restrict_and_diagonal(name):
    k, dense = kernel(name), truth(name)
    few, many = [5, 40, 7], k.top_tokens(60)
    for tokens, others in ((few, None), (few, many), (many, few)):
        columns = tokens if others is None else others
        expected = dense[:, :, tokens][:, :, :, columns].permute(0, 2, 1, 3)
        assert error(k.restrict(tokens, others), expected) <= CLOSE
    diagonal = dense.diagonal(dim1=2, dim2=3)
    assert error(k.diagonal(), diagonal) <= CLOSE
    assert error(k.diagonal(range(3, 14)), diagonal[..., 3:14]) <= CLOSE
    whole = k.restrict(range(zoo.VOCABULARY))
    assert error(whole, dense.permute(0, 2, 1, 3)) <= CLOSE


def test_top_tokens_are_the_likeliest():
    k = kernel("untied")
    mass = k.observed.logits.softmax(-1).sum(0) + k.updated.logits.softmax(-1).sum(0)
    kept = k.top_tokens(5)
    rest = torch.ones(zoo.VOCABULARY, dtype=torch.bool)
    rest[kept] = False
    assert len(kept) == 5 and bool((kept[1:] > kept[:-1]).all())
    assert float(mass[kept].min()) >= float(mass[rest].max())


@pytest.mark.parametrize("name", ["tied", "bias", "soft-capped", "experts"])
def test_explain_splits_off_the_head(name):
    k, dense = kernel(name), truth(name)
    g = torch.randn(5, zoo.VOCABULARY)
    shift = k.explain(g)
    assert error(shift.logits, torch.einsum("mlvw,lw->mv", dense, g.double())) <= CLOSE
    assert error(k @ g, torch.einsum("mlvw,lw->mv", dense, g.double())) <= CLOSE
    slopes = [1.0 if t.slope is None else t.slope for t in (k.observed, k.updated)]
    raw = g * slopes[1]
    products = k.observed.hidden @ k.updated.hidden.T
    if k.updated.anatomy.head_bias is not None:
        products = products + 1
    assert error(shift.head, ((products @ raw) * slopes[0]).double()) <= CLOSE
    parts = shift.log_probs("head") + shift.log_probs("body")
    assert error(parts, shift.log_probs().double()) <= CLOSE
    default = k.explain()
    residual = lddyn.residual(k.updated.logits, k.updated.targets)[0]
    assert error(default.logits, (k @ -residual).double()) <= CLOSE
    with pytest.raises(ValueError, match="part must be one of"):
        shift.log_probs("tail")


def test_bad_tokens():
    k = kernel("untied")
    for tokens in ([], [89], [-1], [[1, 2]]):
        with pytest.raises(ValueError, match="tokens must be vocabulary ids"):
            k.restrict(tokens)
    with pytest.raises(ValueError, match="updated must be vocabulary ids"):
        k.restrict([1], [90])
    for count in (0, 90):
        with pytest.raises(ValueError, match=f"between 1 and 89, got {count}"):
            k.top_tokens(count)


# --------------------------------------------------------------------------- low rank


def dense_form(form):
    """K̂ as (M, L, V, V), by its own product."""
    columns = []
    m, v, count, _ = form.shape
    for token in range(count):
        for w in range(v):
            one = torch.zeros(count, v, dtype=form.ends[1].logits.dtype)
            one[token, w] = 1.0
            columns.append(form @ one)
    return torch.stack(columns, -1).view(m, v, count, v).transpose(1, 2).double()


@pytest.mark.parametrize("name", ["untied", "tied", "soft-capped", "bias"])
def test_low_rank_form(name):
    k, dense = kernel(name), truth(name)
    form = k.lowrank(24, probes=16)
    assert form.rank == 24 and form.shape == k.shape
    held = dense_form(form)
    left = norms(zoo.centred(dense - held), "all")
    assert abs(float(form.residual.value / left) - 1) <= 5 * float(form.residual.stderr / left)
    assert float(left) <= 0.25 * float(norms(zoo.centred(dense), "all"))
    v_o, v_u = torch.randn(6, 89), torch.randn(5, 89)
    expected = torch.einsum("mv,mlvw,lw->ml", v_o.double(), held, v_u.double())
    assert error(form.gram(v_o, v_u), expected) <= CLOSE
    assert error(form.T.gram(v_u, v_o), expected.T) <= CLOSE
    residuals = [lddyn.residual(t.logits, t.targets)[0] for t in (k.observed, k.updated)]
    assert torch.equal(form.gram(), form.gram(*residuals))
    if name in BENT:
        with pytest.raises(NotImplementedError, match="changes its logits"):
            form.frobenius()
    else:
        assert error(form.frobenius(), norms(zoo.centred(held))) <= CLOSE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_full_rank_is_the_kernel(tied):
    """In float64, with as many images as the smaller side has directions, nothing is left."""
    sizes = {"vocab_size": 31, "hidden_size": 8, "num_attention_heads": 2}
    model = zoo.double(zoo.build("llama", tie_word_embeddings=tied, **sizes))
    ends = [lddyn.Example(prompt_ids=[5, 9], response_ids=r) for r in ([4, 7], [11, 3, 8])]
    dense = zoo.dense_kernel(model, *ends)
    with true_float64():
        k = lddyn.ntk(model, *ends)
        form = k.lowrank(2 * 31)
        assert form.rank <= 2 * len(k.products.basis(True))
        held = dense_form(form)
    assert float(form.residual.value) <= 1e-5 * float(norms(zoo.centred(dense), "all"))
    assert error(zoo.centred(held), zoo.centred(dense)) <= 1e-5


def test_near_the_best_of_its_rank():
    """Within √(1 + R/(p − 1)) of the singular values left out, the bound of range finders."""
    k, dense = kernel("untied"), truth("untied")
    head = k.products.head_multiples().double()
    body = zoo.centred(dense - head[:, :, None, None] * torch.eye(89))
    values = torch.linalg.svdvals(body.transpose(1, 2).reshape(6 * 89, 5 * 89))
    form = k.lowrank(20)
    best = values[15:].norm()
    found = norms(zoo.centred(dense - dense_form(form)), "all")
    assert values[20:].norm() <= found <= (1 + 15 / 4) ** 0.5 * best


def test_data_span_is_exact_for_losses_of_the_data():
    k = kernel("tied")
    form = k.lowrank(5, span="data")
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])[:, None]
    g = weights * lddyn.residual(k.updated.logits, k.updated.targets)[0]
    assert error(form @ g, (k @ g).double()) <= 1e-4
    assert error(form.gram(), k.gram().double()) <= 1e-4
    few = k.lowrank(3, span="data")
    assert few.rank == 3 and error(few @ g, (k @ g).double()) > 1e-4


def test_rank_by_precision():
    k = kernel("untied")
    total = norms(zoo.centred(truth("untied")), "all")
    ranks = []
    for rtol in (0.5, 0.1):
        form = k.lowrank(rtol=rtol)
        assert float(form.residual.value / total) <= 1.1 * rtol
        ranks.append(form.rank)
    assert ranks[0] < ranks[1]
    assert k.lowrank(0).rank == 0
    assert k.lowrank(rtol=0.01, limit=8).rank == 8


def test_form_saved_and_read_back(tmp_path):
    for name in ("tied", "soft-capped"):
        form = kernel(name).lowrank(4)
        form.save(tmp_path / name)
        read = lddyn.LowRank.load(tmp_path / name, trained(name))
        g = torch.randn(5, 89)
        assert torch.equal(read @ g, form @ g) and torch.equal(read.gram(), form.gram())
        assert torch.equal(read.residual.value, form.residual.value)
        assert read.residual.samples == form.residual.samples
    with pytest.raises(ValueError, match=r"head's weight .* must be .*, got"):
        lddyn.LowRank.load(tmp_path / "tied", trained("untied"))


def test_bad_low_rank():
    k = kernel("untied")
    for options, match in (
        ({}, "give rank or rtol"),
        ({"rank": 2, "rtol": 0.1}, "give rank or rtol"),
        ({"rank": -1}, "rank must be 0 or more, got -1"),
        ({"rank": 2, "span": "all"}, "span must be 'random' or 'data', got 'all'"),
        ({"rank": 2, "probes": 2}, "probes must be 4 or more"),
        ({"rtol": 2.0}, "rtol must be between 0 and 1, got 2.0"),
    ):
        with pytest.raises(ValueError, match=match):
            k.lowrank(**options)
    form = k.lowrank(1)
    with pytest.raises(ValueError, match=r"G must be \(tokens, vocabulary\) = \(5, 89\)"):
        form @ torch.zeros(6, 89)


# --------------------------------------------------------------------------- the paper's proxies


def test_proxies_of_a_real_step():
    """LBK bounds lr² ‖Π K Π‖² from below, by far; both are what their definitions say."""
    model, (observed, updated) = zoo.double(trained("untied")), zoo.examples()
    lr = 1e-5
    with true_float64():
        before = model(input_ids=torch.tensor([observed.ids])).logits[0][list(observed.positions)]
        loss = -zoo.token_log_probs(model, updated).sum()
        loss.backward()
        logits = model(input_ids=torch.tensor([updated.ids])).logits[0][list(updated.positions)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad
        after = model(input_ids=torch.tensor([observed.ids])).logits[0][list(observed.positions)]
    moved = (after.log_softmax(-1) - before.log_softmax(-1)).detach()
    g = -lddyn.residual(logits.detach(), torch.tensor(list(updated.targets)))[0]
    before = before.detach()
    bound = lddyn.lbk(moved, before, g)
    a = torch.eye(89) - before.softmax(-1)[:, None, :].expand(-1, 89, -1)
    expected = moved.pow(2).sum() / (a.pow(2).sum() * g.pow(2).sum())
    assert abs(float(bound / expected) - 1) <= 1e-9
    square = norms(zoo.centred(truth("untied")), "all") ** 2
    assert 0 < float(bound) <= lr**2 * float(square)
    assert float(lddyn.sign_delta(moved)) == pytest.approx(float(moved.mean()), abs=1e-15)


def test_bad_proxies():
    one = torch.ones(2, 5)
    with pytest.raises(ValueError, match=r"logits must be .* = \(2, 5\), got \(2, 4\)"):
        lddyn.lbk(one, torch.ones(2, 4), one)
    with pytest.raises(ValueError, match=r"cotangents must be .*\(L, 5\), got \(2, 4\)"):
        lddyn.lbk(one, one, torch.ones(2, 4))
    with pytest.raises(ValueError, match="all zero"):
        lddyn.lbk(one, one, torch.zeros(1, 5))
    with pytest.raises(ValueError, match="delta_log_probs must be"):
        lddyn.sign_delta(torch.ones(3))
