"""How long after the last fault everything must have come to its end: limits made of the settings, checked at each run.

Recovery: nobody holds anything under a life that is over, every node that can take part does, and one of them leads.
Work: after that, every task that some node may run has ended.
"""

from __future__ import annotations

from spinetta import claims, holdings, lifecycle, processes, recover, session, steal
from tests.sim.faults import PAUSE_S, Plan
from tests.sim.link import ANSWER_LIMIT_S, LATE_S, STUCK_S
from tests.sim.users import LONGEST_S

EXPIRY_S = 0.5  # etcd looks for leases that have run out twice a second
RECOVERY = (
    "in flight + 2 x (lease + 0.5) + 2 x reconcile + grace x (1 + rho) + margin + retries"  # what `recovery_limit_s` is
)


def recovery_limit_s(plan: Plan) -> float:
    """Until all is repaired. One after the other, at worst:

    requests that are still under way arrive; the leases of nodes and of the office run out, which a change of the
    store's leader may just have given their full time; a deletion that no watch told of shows in a listing; the longest
    grace is waited out; tasks are put back in batches; whoever was given up hears of it and begins again.
    """
    in_flight_s = ANSWER_LIMIT_S + LATE_S + STUCK_S
    graces = [plan.grace_s, *(spec.grace_s for _, spec in plan.submits)]
    wait_s = recover.wait_out_s(max(graces), plan.kill_margin_s, plan.rho)
    batches = 1 + len(plan.submits) // recover.REQUEUE_MAX
    retries_s = batches * recover.RETRY_S + 4 * session.POLL_S + 4 * session.RETRY_S + holdings.RETRY_S
    suspected_s = max(plan.lease_ttl_s, PAUSE_S if "stop" in plan.kinds else 0) + EXPIRY_S
    limit_s = in_flight_s + 2 * suspected_s + 2 * plan.reconcile_s + wait_s + retries_s
    return limit_s / slowest(plan)


def work_limit_s(plan: Plan) -> float:
    """Until every task has ended: one after the other, each with all its tries and with what delays a claim."""
    attempts = sum(spec.retries + 1 for _, spec in plan.submits)
    each_s = LONGEST_S + steal.WAIT_MAX_S + holdings.RETRY_S + claims.RETRY_S
    once_s = claims.HOLD_OFF_S + lifecycle.UNFIT_DELAY_MAX_S + processes.STOP_AGAIN_S + steal.STARVED_AFTER_S
    return (attempts * each_s + once_s + plan.reconcile_s) / slowest(plan)


def slowest(plan: Plan) -> float:
    """The rate of the slowest clock, if clocks are further apart than they are assumed to be."""
    return min((m.clock_rate for m in plan.machines), default=1.0) if plan.wild else 1.0
