"""What notices each fault of the code: a seed of the simulator with its kinds of faults, or a story step by step."""

from __future__ import annotations

from collections.abc import Callable

from tests.unit import test_agent, test_beats, test_recover, test_session
from tests.unit import test_agent_rights as rights
from tests.unit import test_agent_stories as stories

# mutant: the faults that it takes, and a seed that notices
NOTICED: dict[str, tuple[str, int]] = {
    "submit[0]": ("etcd,net", 16),
    "claim[0]": ("", 8),
    "claims-outer[0]": ("admin,net", 1),
    "claims-outer[0,1]": ("", 9),
    "finish[0]": ("partition,net", 0),
    "give_back[0]": ("admin,net", 30),
    "cancel_waiting[0]": ("daemon,net", 16),
    "cancel_running[0]": ("net", 20),
    "register[0,1]": ("daemon,net", 79),
    "Registration.guards[0]": ("lease,net", 0),
    "Registration.guards[0,1]": ("", 9),
    "renew[0,1]": ("partition", 9),
    "take_office[0]": ("", 4),
    "confirm_dead[0]": ("machine", 5),
    "condemn[0]": ("lease,net", 3),
    "condemn[2]": ("", 4),
    "claims-outer[3]": ("rights", 4),
    "claims-outer[0,3]": ("rights", 6),
    "finish_guards[1]": ("rights", 2),
    "Registration.guards[0,3]": ("rights", 0),
    "register[3]": ("rights,net", 17),
    "reattach[3]": ("rights", 2),
    "OfficeHeld.guards[1]": ("rights", 179),
    "leads-on": ("rights", 2),
    "promises-forgotten": ("machine,net", 106),
    "blind-to-labels": ("rights", 1),
    "blind-to-needs": ("", 7),
    "needs-as-hinted": ("", 18),
    "deaf-shim": ("", 0),
    "no-kill-margin": ("", 0),
    "late-start": ("long-freeze at Start", 0),
    "no-wait": ("partition", 0),
    "short-wait": ("partition", 3),
    "renew-unanswered": ("partition", 3),
    "no-losses": ("partition", 3),
    "finish-unknown-is-yes": ("partition", 2),
    "forgetful-daemon": ("runtime,daemon", 8),
    "always-nothing-runs": ("partition", 22),
    "late-news": ("", 2),
    "no-reconcile": ("", 0),
    "lives-go-on": ("net", 24),
    "row QUEUED claim": ("", 0),
    "row QUEUED cancel": ("", 1),
    "row RUNNING finish": ("", 0),
    "row RUNNING retry": ("", 2),
    "row RUNNING release": ("admin", 3),
    "row RUNNING node-lost": ("", 0),
    "row RUNNING give-up": ("net,watch", 8),
}

# mutant: the story, told step by step, that does not come out well with it
TOLD: dict[str, Callable[[], None]] = {
    "no-resume": stories.test_claims_of_a_dead_daemon_come_too_late,
    "no-fresh-listing": stories.test_a_claim_committed_between_listing_and_registration_is_counted,
    "start-unknown-is-no": stories.test_a_start_that_was_not_answered_is_looked_up_not_guessed,
    "start-on-old-listing": stories.test_nothing_is_started_on_the_word_of_an_old_listing,
    "finish_guards[0]": stories.test_what_a_dead_daemon_gave_back_is_not_taken_from_the_next_one,
    "no-must-stop": stories.test_a_condemned_node_stops_all_says_so_and_begins_again,
    "claim-unknown-is-no": stories.test_a_claim_made_again_may_lose_to_its_own_first_proposal,
    "give_back[0]": stories.test_a_cancel_between_the_end_and_its_record_is_not_lost,
    "labels-stay": rights.test_what_is_no_longer_covered_is_given_back_and_all_else_goes_on,
    "revoked-goes-on": rights.test_a_node_that_is_thrown_out_stops_all_and_its_task_runs_elsewhere,
    "claims-as-planned": rights.test_a_round_planned_under_old_rights_is_not_claimed_under_new_ones,
    "doubts-as-planned": rights.test_a_claim_in_doubt_is_not_made_again_without_the_label,
    "braked-by-the-revoked": rights.test_those_who_were_thrown_out_are_no_mass_death,
    "finish_guards[1]": rights.test_of_an_end_under_way_nothing_comes,
    "claims-outer[3]": rights.test_a_claim_under_way_does_not_outlive_the_label,
    "take_office[1]": rights.test_a_candidate_that_is_thrown_out_on_its_way_into_office_does_not_get_there,
    "renewed-when-answered": test_session.test_a_renewal_counts_from_before_it_was_sent,
    "office-for-ever": test_recover.test_no_answer_keeps_the_office_until_the_lease_must_have_ended,
    "wait-for-the-grace-only": test_recover.test_it_waits_reads_puts_back_lists_again_and_closes,
    "wait-without-rho": test_recover.test_it_waits_reads_puts_back_lists_again_and_closes,
    "wait-without-margin": test_recover.test_it_waits_reads_puts_back_lists_again_and_closes,
    "forgetful-daemon": test_agent.test_a_restarted_daemon_goes_on,
    "promises-forgotten": test_beats.test_what_is_brought_in_begins_once_no_heartbeat_names_it,
    "images-for-ever": test_beats.test_an_image_that_takes_down_node_after_node_is_given_up,
}

# mutant: what stands behind it, so that nothing goes wrong without it alone
UNNOTICED: dict[str, str] = {}
