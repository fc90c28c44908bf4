"""GRPO and its kin: advantages, and the loss and its weights against TRL's own trainer."""

import types
import warnings

import pytest
import torch
import zoo

import lddyn
from lddyn.objectives.grouped import LOSS_TYPES, advantages_of

EXAMPLES = [
    lddyn.Example(prompt, [20 + i, 9, 10, 11, 12][:n])
    for i, (prompt, n) in enumerate(
        [([5, 6, 7], 3), ([5, 6, 7], 5), ([5, 9], 2), ([5, 9], 4)],
    )
]
REWARDS = [1.0, 0.0, 0.3, 0.9]


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 2.0, 2.0, 5.0])
    groups = [0, 0, 1, 1, 2]
    none = advantages_of(rewards, groups, "none").tolist()
    assert none == [0.5, -0.5, 0.0, 0.0, 0.0]
    of_group = advantages_of(rewards, groups).tolist()
    assert of_group[0] == pytest.approx(0.5 / (0.5**0.5 + 1e-4))
    assert of_group[2:] == [0.0, 0.0, 0.0]
    of_batch = advantages_of(rewards, groups, "batch").tolist()
    assert of_batch[0] == pytest.approx(0.5 / (float(rewards.double().std()) + 1e-4))


@pytest.fixture(scope="module")
def logps():
    """Log-probs of the policy, of the one that sampled, and of the reference: padded (4, 5)."""
    torch.manual_seed(0)
    now = [-torch.rand(len(e)).double() - 0.5 for e in EXAMPLES]
    return now, *([x + 0.4 * torch.randn(len(x)).double() for x in now] for _ in range(2))


def padded(values):
    return torch.stack([torch.nn.functional.pad(v, (0, 5 - len(v))) for v in values])


def trls_answer(trainer, leaf, old, reference, advantages):
    """TRL's `_compute_loss` where the model's log-probs are a leaf, and the loss's gradient."""
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (leaf, leaf.detach(), None)
    count = sum(map(len, EXAMPLES))
    inputs = {
        "prompt_ids": torch.zeros(4, 3).long(),
        "prompt_mask": torch.ones(4, 3).long(),
        "completion_ids": torch.zeros(4, 5).long(),
        "completion_mask": padded([torch.ones(len(e)) for e in EXAMPLES]).long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": torch.tensor(float(count)),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """The parts of a GRPOTrainer that its loss reads, of the installed TRL."""
    trl = pytest.importorskip("trl")
    from packaging.version import Version

    if Version(trl.__version__) < Version("1.10"):
        pytest.skip(f"TRL {trl.__version__} names the settings of GRPO's loss differently")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = trl.GRPOConfig(
            str(tmp_path_factory.mktemp("grpo")), use_cpu=True, bf16=False, report_to="none"
        )
    arguments.steps_per_generation = 1
    made = trl.GRPOTrainer.__new__(trl.GRPOTrainer)
    gathered = types.SimpleNamespace(num_processes=1, gather=lambda x: x)
    gathered.reduce = lambda x, **kwargs: x
    made.args, made.accelerator, made.model = arguments, gathered, zoo.build("llama")
    made._metrics = {"train": {}, "eval": {}}
    for mode in made._metrics:
        made._metrics[mode] = __import__("collections").defaultdict(list)
    made.aux_loss_enabled, made.top_entropy_quantile = False, 1.0
    made.off_policy_mask_threshold, made.use_vllm = None, False
    made.current_gradient_accumulation_steps, made.max_completion_length = 1, 7
    made._entropy_bonus_enabled, made.epsilon_low, made.epsilon_high = False, 0.2, 0.3
    return made


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_and_weights_are_trls(trainer, logps, loss_type, level, beta):
    now, old, reference = logps
    ours = lddyn.GRPO(
        EXAMPLES,
        REWARDS,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_high=0.3,
        max_completion_length=7,
        old=old,
        reference=reference,
    )
    loss, weights = ours.weights(now)
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = loss_type, level, beta
    leaf = padded(now).requires_grad_()
    theirs, gradient = trls_answer(
        trainer, leaf, padded(old), padded(reference), ours.advantages.clone()
    )
    assert loss == pytest.approx(theirs, rel=1e-12)
    torch.testing.assert_close(padded(weights), gradient, rtol=1e-10, atol=1e-14)


def test_at_the_start_the_ratio_is_one(logps):
    now, _, _ = logps
    grpo = lddyn.GRPO(EXAMPLES, REWARDS, scale_rewards="none")
    _, weights = grpo.weights(now)
    for i, (weight, gain) in enumerate(zip(weights, [0.5, -0.5, -0.3, 0.3], strict=True)):
        wanted = torch.full_like(weight, -gain / (4 * len(EXAMPLES[i])))
        torch.testing.assert_close(weight, wanted)


def test_a_part_keeps_its_advantages(logps):
    now, old, _ = logps
    whole = lddyn.GRPO(EXAMPLES, REWARDS, loss_type="luspo", old=old)
    part = whole.subset([2, 0])
    _, of_whole = whole.weights(now)
    _, of_part = part.weights([now[2], now[0]])
    torch.testing.assert_close(of_part[0] / 2, of_whole[2])
    torch.testing.assert_close(of_part[1] / 2, of_whole[0])
    assert part.rewards.tolist() == [REWARDS[2], REWARDS[0]]


def test_equal_rewards_are_said():
    remarks = lddyn.GRPO(EXAMPLES, [1, 1, 0, 1]).remarks()
    assert len(remarks) == 1
    assert "1 of 2 groups all rewards are equal" in remarks[0]
    single = lddyn.GRPO(EXAMPLES, [1, 0, 0, 1], groups=[0, 0, 0, 1]).remarks()
    assert "1 of 2 groups have one completion" in single[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": [1.0]}, "rewards must be one per completion, got 1 for 4"),
        ({"rewards": [1.0, 0.0, float("nan"), 0.0]}, "rewards must be finite"),
        ({"groups": [0]}, "groups must be one per completion, got 1 for 4"),
        ({"loss_type": "ppo"}, "loss_type must be one of grpo"),
        ({"scale_rewards": "all"}, "scale_rewards must be one of group"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of token"),
        ({"epsilon": -1.0}, "epsilon must be at least 0"),
        ({"old": "sampler"}, 'old must be "self"'),
        ({"old": [torch.zeros(3)]}, "old must be one tensor a completion"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        lddyn.GRPO(EXAMPLES, **{"rewards": REWARDS, **arguments})


@pytest.mark.case("GRPO as TRL's config has it")
def test_a_config_of_trl_is_read(tmp_path):
    trl = pytest.importorskip("trl")
    options = {"loss_type": "dr_grpo", "scale_rewards": "none", "epsilon": 0.3, "beta": 0.04}
    options |= {"max_completion_length": 32}
    config = trl.GRPOConfig(
        str(tmp_path), top_entropy_quantile=0.5, bf16=False, use_cpu=True, report_to=[], **options
    )
    (tmp_path / "grpo.yaml").write_text(
        "".join(f"{k}: {v}\n" for k, v in options.items()) + "num_generations: 4\n"
    )
    model = zoo.build("llama", num_hidden_layers=1)
    rows = list(zip(EXAMPLES, REWARDS, strict=True))
    wanted = lddyn.diagnose(model, lddyn.GRPO(EXAMPLES, REWARDS, **options))
    for source in (config, tmp_path / "grpo.yaml"):
        found = lddyn.diagnose(model, rows, like=source)
        assert found.step.described == wanted.step.described
        assert torch.equal(found.step.weights, wanted.step.weights)
    assert "tokens of highest entropy alone" in " ".join(
        lddyn.diagnose(model, rows, like=config).step.remarks
    )
    assert lddyn.Run.like(config).lr == 1e-6
    told = lddyn.decompose(model, EXAMPLES[0], rows, like=config)[0]
    own = lddyn.decompose(
        model, EXAMPLES[0], lddyn.GRPO(EXAMPLES, REWARDS, **options), like=config
    )[0]
    assert torch.equal(told.influence, own.influence)
    default = lddyn.diagnose(model, rows)
    assert default.step.described["loss_type"] == "grpo"
    with pytest.raises(ValueError, match="completions with rewards"):
        lddyn.decompose(model, EXAMPLES[0], (EXAMPLES[0], EXAMPLES[1]), like=config)
    with pytest.raises(ValueError, match="GRPO learns from completions with rewards, not from"):
        lddyn.diagnose(model, [(EXAMPLES[0], EXAMPLES[1])], like=config)


def test_the_reference_of_a_config_is_the_adapters():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(zoo.build("llama", num_hidden_layers=1), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    with model.disable_adapter():
        known = [lp.detach() for lp in lddyn.token_log_probs(model, EXAMPLES)]
    options = {"beta": 0.5, "loss_type": "dapo"}
    rows = list(zip(EXAMPLES, REWARDS, strict=True))
    like, own, without = (
        lddyn.decompose(model, EXAMPLES[0], update, like={"trainer": "grpo", **options})[0]
        for update in (
            rows,
            lddyn.GRPO(EXAMPLES, REWARDS, reference=known, **options),
            lddyn.GRPO(EXAMPLES, REWARDS, **options),
        )
    )
    torch.testing.assert_close(like.influence, own.influence)
    assert not torch.allclose(like.influence, without.influence)
