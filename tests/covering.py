"""Few test cases instead of a full product: every two values occur together in one of them.

Faults of a kernel come from one value (an empty shape) or from two that meet (a ragged shape in
bfloat16). Cases that hold every pair of values find them; a full product repeats each pair many
times.
"""

import heapq
import itertools


def covering(axes, allowed=lambda **case: True):
    """Cases such that every pair of values of two axes occurs in at least one.

    Greedy: the next case is the one with the most pairs that have not occurred; ties go to the
    first in the order of the full product, so that the choice is the same in every process.

    Args:
        axes: Name of an axis -> its values.
        allowed: Called with one value an axis, by name; False drops the case. A pair that no
            allowed case holds is not required.

    Returns:
        List of tuples, one value an axis, in the order of the full product.
    """
    axes = {name: list(values) for name, values in axes.items()}
    places = list(itertools.product(*(range(len(values)) for values in axes.values())))
    cases = [dict(zip(axes, case, strict=True)) for case in itertools.product(*axes.values())]
    pairs = {
        k: set(itertools.combinations(enumerate(place), min(2, len(axes))))
        for k, (place, case) in enumerate(zip(places, cases, strict=True))
        if allowed(**case)
    }
    missing = set().union(*pairs.values())
    # New pairs of a case become fewer with every choice: an old count is an upper bound.
    waiting = [(-len(held), k) for k, held in pairs.items()]
    heapq.heapify(waiting)
    chosen = []
    while missing:
        bound, k = heapq.heappop(waiting)
        count = len(pairs[k] & missing)
        if count == -bound:
            chosen.append(k)
            missing -= pairs[k]
        elif count:
            heapq.heappush(waiting, (-count, k))
    return [tuple(cases[k].values()) for k in sorted(chosen)]
