"""The claims about DPO, and how each is decided."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lddyn.lab.curves import Curves, bell, unrelated
from lddyn.lab.dpo.tables import AGAIN, ON_POLICY, Runs, off_policy
from lddyn.lab.mass import shares_of_mass
from lddyn.lab.record import Claim, Lab
from lddyn.lab.setting import Setting
from lddyn.lab.shares import bootstrap_of, verdict
from lddyn.stats import bootstrap


def make_claims(lab: Lab, runs: Runs) -> Iterator[Claim]:
    """All claims of the experiment; the lab's generators resample the prompts."""
    main = runs.curves[runs.main]
    if any("_gpt" in name for name in main.fields):
        yield _rephrases(lab, main)
    yield _rise_and_fall(lab, main)
    yield _decay(lab, main, runs.curves[AGAIN])
    yield _greedy(lab, main)
    yield _squeezed(lab, runs)
    if len(runs.lengths) > 1:
        yield _longer(lab, runs)
    yield _on_policy(lab, runs)


def _rephrases(lab: Lab, main: Curves) -> Claim:
    def change(prefix: str) -> np.ndarray:
        names = [n for n in main.fields if n.startswith(prefix) and "_gpt" in n]
        mean: np.ndarray = np.nanmean([main.change(n) for n in names], axis=0)
        return mean

    rejected, chosen = change("reject"), change("chosen")
    gap, interval = bootstrap_of(lab, "kin", rejected - chosen)
    return Claim(
        "dpo 1",
        "Rephrases of y− fall faster than rephrases of y+.",
        "§4.2, result 1; Fig. 4",
        "pythia-410m: gpts− −50.9 and gptf− −43.1, gpts+ −32.0 and gptf+ −31.7 nats",
        f"{np.nanmean(rejected):+.2f} against {np.nanmean(chosen):+.2f} nats",
        verdict(interval[1] < 0),
        "difference per prompt, mean of the two rewordings of each response",
        value=gap,
        interval=interval,
    )


def _rise_and_fall(lab: Lab, main: Curves) -> Claim:
    rise, fall = bell(main.log_prob[:, :, main.column("chosen")])
    (up, up_interval), (down, down_interval) = (
        bootstrap_of(lab, name, values) for name, values in (("rise", rise), ("fall", fall))
    )
    lost, lost_interval = bootstrap_of(lab, "lost", main.change("rejected"))
    return Claim(
        "dpo 2",
        "y+ rises first and falls later, while y− falls all along.",
        "§4.2, result 2; Fig. 4",
        "pythia-410m: y+ −152.0 → −140.2 → −146.3, y− −121.4 → −197.6",
        f"y+ rises by {up:+.2f} (95 %: {up_interval[0]:+.2f} to {up_interval[1]:+.2f}), then "
        f"changes by {down:+.2f} ({down_interval[0]:+.2f} to {down_interval[1]:+.2f}); y− "
        f"{lost:+.2f} nats",
        verdict(up_interval[0] > 0 and down_interval[1] < 0 and lost_interval[1] < 0),
        "the peak is located on other prompts than it is tested on",
        value=down,
        interval=down_interval,
    )


def _decay(lab: Lab, main: Curves, again: Curves) -> Claim:
    decay, interval = bootstrap_of(lab, "decay", unrelated(main) - unrelated(again))
    return Claim(
        "dpo 3",
        "Unrelated responses decay faster under DPO than under SFT, at the same rate.",
        "§4.2, result 3",
        "“much faster”, even at a smaller rate; pythia-410m DPO: y_j≠u −29.6, y_test −48.9, y_hum "
        "−34.7 nats",
        f"DPO {np.nanmean(unrelated(main)):+.2f}, SFT {np.nanmean(unrelated(again)):+.2f} nats",
        verdict(interval[1] < 0),
        "same start, rows, rate and number of updates; mean of the three unrelated types",
        value=decay,
        interval=interval,
    )


def _greedy(lab: Lab, main: Curves) -> Claim:
    peak, interval = bootstrap_of(lab, "greedy", main.change("chosen", "greedy"))
    gain, gain_interval = bootstrap_of(lab, "gain", main.change("chosen"))
    return Claim(
        "dpo 4a",
        "Greedy confidence rises while y+ falls.",
        "§4.2, result 4; Fig. 4",
        "−113 → −63 within 8 epochs, “even faster than” SFT's y+",
        f"Σ log max π along y+: {peak:+.2f} nats, y+ {gain:+.2f} (95 %: {gain_interval[0]:+.2f} to "
        f"{gain_interval[1]:+.2f})",
        verdict(interval[0] > 0 and gain_interval[1] < 0),
        "greedy confidence along y+'s own prefix; in a model this small little mass can move to "
        "the greedy token",
        corrected="that series was measured on random words; corrected stored runs: −61.6 → "
        "−54.4, slower than SFT's −44.5, or −41.2 at batch 2 with y+ −152.0 → −156.2",
        value=peak,
        interval=interval,
    )


def _squeezed(lab: Lab, runs: Runs) -> Claim:
    mass = runs.mass[runs.main]
    share, interval = bootstrap(
        np.array([[response["response"], response["likeliest other"]] for response in mass]),
        lambda x: float(-x[:, 1].sum() / x[:, 0].sum()),
        generator=lab.generator("bootstrap", "share"),
    )
    parts = shares_of_mass(mass)
    return Claim(
        "dpo 4b",
        "The mass of y− is squeezed into the likeliest token.",
        "§4.2; §3.3",
        "argued from the one-position theory; never measured",
        f"of the mass that y− lost at its positions {100 * share:.0f} % went to the likeliest "
        f"other token, {100 * parts['top']:.0f} % to the rest of the ten likeliest, "
        f"{100 * parts['rest']:.0f} % to all others",
        verdict(interval[0] > 0.5),
        "agrees if it is more than half for sure; whole run, summed over positions of y− in the "
        "probes",
        value=share,
        interval=interval,
    )


def _longer(lab: Lab, runs: Runs) -> Claim:
    changes = {n: unrelated(runs.curves[off_policy(n)]) for n in runs.lengths}
    difference = changes[runs.lengths[-1]] - changes[runs.lengths[0]]
    longer, interval = bootstrap_of(lab, "longer", difference)
    return Claim(
        "dpo 4c",
        "The longer SFT lasted, the stronger the squeeze.",
        "poster: “train longer → stronger”",
        "no number survives",
        "unrelated responses change by "
        + ", ".join(f"{np.nanmean(change):+.2f} after {n}" for n, change in changes.items())
        + " updates of SFT (nats)",
        verdict(interval[1] < 0),
        "decided by the longest against the shortest SFT, with the same DPO after both",
        value=longer,
        interval=interval,
    )


def _on_policy(lab: Lab, runs: Runs) -> Claim:
    ours, main = (unrelated(runs.curves[name]) for name in (ON_POLICY, runs.main))
    difference, interval = bootstrap_of(lab, "on", ours - main)
    return Claim(
        "on-policy",
        "With pairs from the model itself the squeeze is weaker.",
        "§4.2; Fig. 2",
        "a sketch",
        f"unrelated responses {np.nanmean(ours):+.2f} nats on-policy, {np.nanmean(main):+.2f} "
        "off-policy",
        verdict(interval[0] > 0),
        "two samples per prompt; the one that shares more words with the data's answer is "
        "preferred",
        value=difference,
        interval=interval,
    )


def expected() -> list[str]:
    """What the paper predicts."""
    return [
        "y+ rises a little and falls later; y− falls far, and everything else falls with it; "
        "rewordings of y− fall faster than those of y+; the mass goes to the greedy answer, more "
        "so after longer SFT.",
    ]


def seen(setting: Setting, runs: Runs, pairs: int) -> list[str]:
    """What was measured; `pairs` is the number of on-policy pairs."""
    main = runs.curves[runs.main]
    spent = [curves.raw["seconds"] for curves in runs.curves.values()]
    whole, probing = sum(s["all"] for s in spent), sum(s["probes"] for s in spent)
    measured, predicted = runs.step("measured"), runs.step("predicted")
    return [
        f"{setting.title}, after {runs.lengths[-1]} updates of SFT: in {main.updates[-1]} updates "
        f"of DPO y+ changes by {np.nanmean(main.change('chosen')):+.2f}, y− by "
        f"{np.nanmean(main.change('rejected')):+.2f}, unrelated responses by "
        f"{np.nanmean(unrelated(main)):+.2f}, greedy confidence by "
        f"{np.nanmean(main.change('chosen', 'greedy')):+.2f} nats. {pairs} on-policy pairs.",
        f"One small step took {-measured['response']:.3g} of probability from y−'s tokens "
        f"(predicted: {-predicted['response']:.3g}), and the likeliest other tokens gained "
        f"{measured['likeliest other']:.3g} (predicted: {predicted['likeliest other']:.3g}). y− "
        f"was itself the likeliest at {100 * measured['was likeliest']:.0f} % of its positions.",
        f"Passes over the probing set took {100 * probing / whole:.0f} % of the runs' CPU time.",
    ]
