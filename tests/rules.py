"""The 36 faults that drsync must survive, by number, and the tests that prove that it does.

    pytest --rule 3             just the tests of rule 3
    python tests/rules.py       write the table of docs/reliability.md anew

Ranked by what they would cost; docs/reliability.md shows this list to people. A test that is not there, or a rule
without one, fails tests/unit/test_rules.py.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs/reliability.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A fault, what must become of it, and what proves that."""

    number: int
    fault: str
    expected: str
    tests: Mapping[str, Sequence[str]]
    """Names of tests, by their file below tests/."""

    @property
    def ids(self) -> list[str]:
        """The tests as pytest names them."""
        return [f"tests/{file}::{name}" for file, tests in self.tests.items() for name in tests]


def rule(number: int, fault: str, expected: str, **tests: str) -> Rule:
    """A rule; each keyword is a file (`fault__test_seed`), its value the names of tests in it."""
    files = {f"{file.replace('__', '/')}.py": names.split() for file, names in tests.items()}
    return Rule(number=number, fault=fault, expected=expected, tests=files)


RULES: Final = (
    rule(
        1,
        "kill -9 at every step",
        "the last acknowledged point is exact, and the next cycle goes on",
        fault__test_cycle_crash="""
            test_a_crash_at_any_step_of_a_capture_loses_no_point
            test_a_crash_at_any_step_of_a_full_that_was_asked_for_loses_no_point
            test_a_crash_at_any_step_of_an_idle_cycle_loses_no_point
            test_a_crash_at_any_step_of_a_take_over_loses_no_point
            test_a_crash_at_any_step_of_shipping_packs_loses_no_point
            test_a_cycle_that_writes_a_block_map_may_die_at_each_of_its_steps""",
        fault__test_seed="test_a_crash_at_any_step_of_a_seed_loses_no_point",
        fault__test_quiesce_crash="test_a_crash_at_any_step_leaves_no_guest_held",
        fault__test_directory_crash="""
            test_s1_s3_after_kill_every_listed_object_is_whole_and_every_acknowledged_one_listed""",
        cli__test_daemon_process="test_after_kill_9_the_next_daemon_goes_on",
    ),
    rule(
        2,
        "two daemons for one VM",
        "one chain; the loser stops and clears nothing",
        fault__test_cycle_faults="""
            test_a_writer_that_takes_over_during_a_capture_fences_the_first_for_good
            test_of_two_daemons_one_is_fenced_and_every_point_is_right""",
        cli__test_daemon_process="test_of_two_daemons_one_is_fenced_says_so_once_and_stops_for_the_vm",
        unit__test_log="""
            test_f20_the_writer_that_was_taken_over_is_refused_at_its_next_segment
            test_f20_a_writer_that_wrote_before_does_not_take_the_vm_back_by_itself""",
        contract__test_store="""
            test_s2_of_two_creators_that_race_exactly_one_wins
            test_s2_of_two_processes_that_race_in_a_directory_exactly_one_wins""",
    ),
    rule(
        3,
        "an object is stored and the reply is lost",
        "one's own bytes are one's own success; others' are a lost race",
        fault__test_retry="""
            test_s2_a_create_whose_reply_was_lost_is_ones_own_success
            test_s2_an_object_of_ones_own_from_before_a_restart_is_ones_own_success
            test_s2_another_object_under_the_key_is_a_lost_race_also_after_a_lost_reply
            test_bytes_that_were_stored_damaged_are_not_taken_for_ones_own""",
        fault__test_cycle_faults="test_lost_replies_are_settled_by_the_retries_within_the_cycle",
        fault__test_rules="test_f20_a_writer_is_not_fenced_by_its_own_segment",
        localstack__test_s3_store="test_s2_the_reply_to_a_create_is_lost_and_the_retry_knows_its_own_object",
    ),
    rule(
        4,
        "a bitmap is lost, QEMU is killed, a snapshot reverted, a disk written while the VM is off",
        "everything is read again and compared; never a silent increment",
        contract__test_source="""
            test_c4_another_base_than_the_bitmaps_capture_makes_a_full
            test_c4_disks_that_change_places_make_fulls
            test_c4_without_a_base_everything_is_full
            test_after_a_power_cut_the_reason_for_the_full_is_said""",
        fault__test_cycle_crash="test_what_is_crashed_is_what_its_name_says",
        qemu__test_qmp_source="test_a_snapshot_makes_a_full_and_the_bitmap_below_it_harms_nobody",
        libvirt__test_offline="""
            test_a_domain_that_ran_in_between_is_noticed
            test_after_a_power_cut_everything_is_read_again""",
        libvirt__test_trouble="""
            test_images_put_back_to_an_older_state_are_read_again
            test_a_snapshot_that_splits_a_bitmap_of_a_domain_that_is_off_makes_a_full""",
    ),
    rule(
        5,
        "anything, in any order",
        "every surviving point is what the disks held at its instant",
        fault__test_stress="""
            test_after_anything_that_can_happen_every_point_is_what_the_disks_held
            test_the_same_seed_does_the_same_bit_for_bit
            test_a_model_that_differs_is_noticed""",
        qemu__test_property="test_any_history_restores_at_every_point",
        qemu__test_seed_property="test_any_history_of_seeds_restores_at_every_point",
        libvirt__test_pull_property="test_any_history_of_seeds_restores_at_every_point",
    ),
    rule(
        6,
        "any byte of any object changes, or the object is cut",
        "refused, also if hashes without a key were made anew; never other data without a word",
        golden__test_golden="""
            test_verify_notices_a_changed_byte_anywhere_in_a_segment_or_pack
            test_a_changed_segment_or_pack_is_refused_where_it_is_needed_and_never_restores_wrong
            test_recover_py_refuses_a_changed_segment_or_pack_at_the_point_that_it_hurts
            test_a_changed_byte_of_repo_json_never_restores_wrong
            test_a_changed_byte_of_the_recovery_slot_never_gives_another_key""",
        fault__test_fuzz="test_a_changed_repository_gives_the_right_bytes_or_an_error",
    ),
    rule(
        7,
        "a host's credentials are stolen: delete, overwrite, unlock, another VM",
        "all of it is denied; old points restore",
        fault__test_stolen_credentials="""
            test_rule_7_stolen_host_credentials_destroy_nothing_and_old_points_restore
            test_rule_7_what_a_too_wide_policy_lets_pass_the_lock_still_keeps""",
        unit__target__ec2__test_policy="""
            test_a_host_can_not_delete_even_if_another_policy_allows_it
            test_a_host_reads_its_own_vms_and_no_others""",
        localstack__test_least_privilege="test_each_role_may_do_all_that_its_store_does_and_nothing_else",
    ),
    rule(
        8,
        "prune while others capture and restore, interrupted at every step",
        "nothing that lives is deleted",
        fault__test_prune="""
            test_a_capture_at_any_step_of_a_prune_loses_nothing
            test_a_prune_at_any_step_of_a_capture_costs_at_most_that_capture
            test_a_restore_that_began_before_a_prune_may_end_within_the_grace_time
            test_a_prune_without_grace_time_at_any_step_of_a_restore_is_told_and_a_second_restore_is_right
            test_packs_of_a_seed_that_still_sends_stay_however_old_they_are""",
        unit__test_prune="test_what_stays_restores_whatever_happened_and_whatever_is_dropped",
    ),
    rule(
        9,
        "a listing fails, is empty or cut while prune looks",
        "it ends; nothing is deleted",
        fault__test_prune="""
            test_9_a_listing_that_is_cut_deletes_nothing_that_is_needed
            test_9_a_log_that_is_never_listed_is_no_new_vm
            test_9_a_listing_that_fails_ends_the_run""",
    ),
    rule(
        10,
        "a stalled writer writes into a slot that prune freed",
        "not acknowledged",
        fault__test_prune="""
            test_10_a_zombie_that_writes_into_a_slot_that_prune_freed_is_not_acknowledged
            test_10_a_writer_that_slept_through_several_prunes_learns_it_too
            test_a_capture_that_sleeps_over_its_packs_at_any_step_commits_none_that_are_gone""",
        fault__test_rules="test_a_prune_right_behind_a_create_does_not_fence_the_writer",
        fault__test_stress="test_after_anything_that_can_happen_every_point_is_what_the_disks_held",
    ),
    rule(
        11,
        "copying forward dies, or copies wrongly",
        "what it copies from stays until the copy was read back",
        fault__test_prune="""
            test_11_what_can_not_be_copied_faithfully_stays_where_it_is
            test_dying_at_any_write_leaves_every_point_and_the_next_run_ends_the_work""",
    ),
    rule(
        12,
        "a recovery for real",
        "the guest boots, its files are right, the time that it took is told",
        qemu__test_quickstart="test_the_quickstart_loses_a_vm_and_brings_it_back",
        libvirt__test_restore="test_a_vm_comes_back_as_it_was_and_boots",
        libvirt__test_two_sites="test_a_lost_site_comes_back_on_another_and_goes_home",
        libvirt__test_plan="test_the_report_is_a_table_for_people",
        localstack__test_instance_from_guest="""
            test_a_guest_that_lost_its_site_boots_as_an_instance_by_bios_and_by_uefi""",
    ),
    rule(
        13,
        "drsync is gone",
        "examples/recover.py brings every point of every format's repository back",
        golden__test_golden="""
            test_there_is_a_repository_of_every_released_format
            test_restore_brings_every_point_back
            test_recover_py_brings_every_point_back""",
        cli__test_recover_script="test_every_point_is_the_same test_damage_is_refused_and_leaves_no_file",
    ),
    rule(
        14,
        "garbage points with forged times",
        "retention goes by the store's time; genuine points stay",
        unit__test_retention="""
            test_forged_points_push_no_more_out_than_one_honest_point_for_each_bucket_that_begins
            test_a_flood_into_the_present_buckets_takes_nothing_that_stands_for_one
            test_the_minimum_age_keeps_a_flood""",
    ),
    rule(
        15,
        "a repository that was rolled back or mixed up with another one",
        "noticed by everybody who remembers more; nothing is written",
        fault__test_cycle_faults="test_a_repository_that_was_rolled_back_is_noticed_and_nothing_is_written",
        golden__test_golden="test_f16_without_its_newest_point_it_is_refused",
        unit__test_repository="""
            test_f5_another_repositorys_key_is_refused
            test_another_repositorys_slot_under_this_ones_name_is_refused""",
        unit__test_mapped="test_f23_a_map_of_a_log_that_was_rolled_back_and_written_anew_is_done_without",
    ),
    rule(
        16,
        "a frame is moved to another block, disk, VM or object",
        "it does not open",
        unit__format__test_frame="test_f11_a_frame_that_was_moved_does_not_open",
        unit__test_repository="test_f8_a_pack_under_another_packs_name_is_refused",
    ),
    rule(
        17,
        "a block map is missing, old or damaged",
        "the same bytes, only later",
        unit__test_mapped="""
            test_f22_a_missing_map_is_done_without
            test_f22_a_map_that_is_damaged_anywhere_is_done_without
            test_f22_maps_that_change_places_are_done_without
            test_every_point_restores_by_maps_as_without""",
        fault__test_maps="test_the_store_fails_in_the_middle_of_a_mapped_restore",
    ),
    rule(
        18,
        "Object Lock, default retention, deletions that are denied",
        "captures and maintenance succeed; later is not never",
        fault__test_stolen_credentials="test_18_in_a_bucket_that_locks_everything_by_itself_all_works",
        fault__test_prune="test_18_deletions_that_are_denied_are_later_and_not_fatal",
    ),
    rule(
        19,
        "maintenance is dead, and locks are about to lapse",
        "the alarm comes before",
        fault__test_stolen_credentials="test_19_when_the_maintenance_is_dead_the_alarm_comes_before_the_locks_end",
        unit__test_locks="test_the_alarm_comes_before_the_locks_lapse",
    ),
    rule(
        20,
        "500, 503, resets, half bodies, half an hour without the store",
        "the layer waits, the lag is told, and it is caught up without a full",
        fault__test_cycle_faults="""
            test_a_store_that_fails_once_costs_no_point
            test_while_the_store_is_down_the_layer_waits_and_nothing_more_is_captured
            test_a_first_capture_waits_too""",
        fault__test_seed="test_a_store_that_fails_in_the_middle_costs_nothing_but_the_pack_on_its_way",
        localstack__test_s3_store="""
            test_s1_a_create_over_a_broken_line_stores_all_or_nothing_and_a_retry_settles_it
            test_a_store_that_is_down_is_unavailable_and_found_again
            test_s6_the_error_replies_of_aws""",
    ),
    rule(
        21,
        "the line drops in the middle of a restore",
        "it goes on, and the disk is exact",
        fault__test_rules="test_reads_that_break_off_in_a_restore_are_made_again",
        localstack__test_s3_store="test_s6_a_read_over_a_broken_line_is_unavailable_and_a_retry_gets_it",
        libvirt__test_restore="test_a_killed_restore_leaves_nothing_that_looks_finished_and_the_next_one_works",
    ),
    rule(
        22,
        "a clock that is wrong, or is set",
        "points are in the order of their numbers, none is lost",
        fault__test_cycle_faults="test_a_clock_set_back_keeps_the_points_in_order",
        unit__test_daemon="""
            test_setting_the_clock_does_not_move_a_due_time
            test_setting_the_clock_neither_stalls_nor_floods_the_captures""",
        unit__test_catalog="test_the_lag_is_the_age_of_what_could_be_restored_and_never_negative",
    ),
    rule(
        23,
        "an index made to hurt: a bomb, 2³² rows, blocks behind the disk's end, `../` in a name",
        "refused in bounded time and memory; nothing is written outside of the target",
        fault__test_fuzz="""
            test_an_object_that_authenticates_and_is_absurd_costs_little
            test_a_compressed_bomb_is_not_unpacked
            test_a_name_from_the_repository_never_leaves_the_target""",
        unit__test_spool="test_f2_what_is_no_name_of_a_vm_gets_no_directory",
    ),
    rule(
        24,
        "a host is cloned, forked, or put back to an older state",
        "no key and nonce are used for two contents",
        fault__test_rules="""
            test_no_key_seals_two_contents_whatever_is_cloned_or_tried_again
            test_a_fork_draws_other_ids""",
    ),
    rule(
        25,
        "KMS denies, a key is deleted, rotated, lost, wrong, or another repository's",
        "the slot that is kept elsewhere opens; the wrong one is named",
        unit__test_repository="""
            test_a_new_repository_opens_with_its_key_and_its_recovery_key
            test_f5_another_repositorys_key_is_refused
            test_another_recovery_key_is_refused
            test_a_slot_that_was_changed_is_refused""",
        contract__test_key_service="""
            test_a_key_that_is_deleted_is_named_with_its_slot
            test_what_was_wrapped_opens_after_kms_has_rotated_its_key""",
        localstack__test_kms="test_a_key_in_kms_opens_the_repository_and_the_recovery_key_when_it_is_gone",
        cli__test_key_slots="""
            test_rotate_gives_new_points_a_new_key_and_the_old_ones_stay
            test_what_does_not_open_is_named""",
        unit__test_generations="""
            test_every_point_restores_whatever_keys_it_lies_under
            test_a_host_whose_keys_are_older_reads_the_older_points_and_is_told_what_it_lacks""",
        cli__test_init_and_key="test_the_recovery_key_from_stdin_writes_the_same_key_file_again",
    ),
    rule(
        26,
        "a byte changes on its way to the store",
        "the store refuses it, by the checksum that was made before",
        contract__test_store="test_s4_bytes_that_do_not_match_their_checksum_are_refused",
        fault__test_stress="test_after_anything_that_can_happen_every_point_is_what_the_disks_held",
        localstack__test_s3_store="""
            test_a_create_is_one_conditional_signed_request_with_the_callers_checksum""",
    ),
    rule(
        27,
        "the compressor has a mistake, or memory flips a bit",
        "frames are read back before the commit; nothing is committed",
        fault__test_rules="test_what_does_not_come_back_as_it_was_is_not_committed",
    ),
    rule(
        28,
        "TRIM, zeroes, a short last block, a disk that grows or is added while the VM runs",
        "exact",
        contract__test_source="""
            test_c2_zeros_and_discards_are_explicit_in_an_increment
            test_c2_the_short_last_block_is_captured
            test_a_disk_that_grew_is_captured_in_full_and_the_others_are_not
            test_a_new_disk_starts_with_a_full""",
        libvirt__test_trouble="test_a_hot_added_disk_starts_with_a_full_and_the_others_go_on",
        qemu__test_property="test_a_history_with_all_kinds_of_steps_restores_at_every_point",
    ),
    rule(
        29,
        "no room: in the spool, in the repository, at the target",
        "the guest is not hurt, nothing half is committed or looks finished",
        fault__test_cycle_faults="test_a_full_spool_is_told_before_qemu_is_touched",
        fault__test_rules="test_a_directory_without_room_costs_no_point",
        contract__test_source_failures="test_c3_a_failed_capture_loses_nothing",
        contract__test_target="test_t2_a_writer_that_can_not_be_made_leaves_no_file_and_no_lock",
        unit__test_spool="test_the_room_for_a_capture_must_be_there_beside_the_reserve",
        libvirt__test_pull_trouble="""
            test_when_others_fill_the_file_system_the_job_ends_and_the_guest_goes_on""",
    ),
    rule(
        30,
        "credentials expire in the middle of a point",
        "new ones are fetched, and it goes on",
        unit__store__test_s3_credentials="""
            test_credentials_that_run_out_are_fetched_anew_in_the_midst_of_it
            test_without_new_ones_it_is_denied_and_says_so""",
        localstack__test_s3_store="test_expired_credentials_are_told_as_such_by_every_method",
    ),
    rule(
        31,
        "a guest that writes faster than the line takes",
        "captures coalesce, the guest does not wait, the lag is told as it is",
        fault__test_cycle_faults="""
            test_while_the_store_is_down_the_layer_waits_and_nothing_more_is_captured""",
        fault__test_seed="test_a_guest_that_writes_faster_than_the_line_takes_is_told_of",
        unit__test_daemon="""
            test_an_rpo_that_cant_be_held_is_said_once
            test_runs_that_take_longer_than_half_the_rpo_follow_each_other_at_once""",
        qemu__test_live="test_while_drsync_waits_for_its_pace_qemu_can_drain_its_disks",
    ),
    rule(
        32,
        "somebody reads the bucket and knows a file",
        "nothing tells whether a VM has it: no hash of plain bytes in names, headers, or the log",
        fault__test_rules="test_nothing_in_the_clear_depends_on_what_is_in_a_block",
    ),
    rule(
        33,
        "a repository that needs more than this drsync knows",
        "refused",
        unit__test_repository="test_f4_a_repository_that_needs_more_than_this_drsync_knows_is_refused",
    ),
    rule(
        34,
        "a restore onto a running VM, or over what is there",
        "refused",
        cli__test_main_path="test_restore_refuses_existing_files_unless_told_to_overwrite",
        libvirt__test_restore="test_what_is_in_the_way_is_refused_and_left",
        contract__test_target="test_t1_an_existing_file_is_refused_at_once_and_not_touched",
    ),
    rule(
        35,
        "keys in arguments, environment, log or core; a daemon that may do too much",
        "they are not there; systemd rates the unit's exposure 3.0 at most",
        cli__test_init_and_key="""
            test_the_recovery_key_cannot_be_an_argument
            test_at_a_terminal_the_recovery_key_is_asked_for_and_not_shown
            test_a_key_that_others_can_read_is_refused""",
        cli__test_key_leaks="""
            test_no_secret_is_seen_of_any_command
            test_no_repr_of_anything_that_holds_a_key_shows_it
            test_a_process_that_is_killed_by_its_own_fault_leaves_no_memory_behind""",
        cli__test_service="test_systemd_finds_the_unit_little_exposed",
        unit__format__test_keys="test_nothing_that_is_a_key_shows_itself",
        unit__test_keyfile="test_a_file_that_is_no_key_file_is_refused_without_showing_it",
    ),
    rule(
        36,
        "drsync itself is broken on purpose",
        "the tests notice",
        unit__test_mutants="""
            test_every_mutant_is_one_line_of_the_code_as_it_is
            test_every_mutant_was_killed""",
    ),
)


def functions_of(file: Path) -> set[str]:
    """The names of the tests in a file."""
    tree = ast.parse(file.read_bytes())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    return {function.name for function in found}


def rules_of(test_id: str) -> list[int]:
    """The rules that a test proves, by its id without parameters."""
    return [rule.number for rule in RULES if test_id.partition("[")[0] in rule.ids]


def table() -> str:
    """The rules as docs/reliability.md shows them."""
    rows = [f"| {r.number} | {r.fault} | {r.expected} | {_told(r)} |" for r in RULES]
    return "\n".join(["| rule | fault | what becomes of it | proved by |", "| --- | --- | --- | --- |", *rows])


def _told(rule: Rule) -> str:
    files = [f"{file}: {', '.join(f'`{name}`' for name in names)}" for file, names in rule.tests.items()]
    return "; ".join(files)


def between(text: str, mark: str, inside: str) -> str:
    """A page with something else between its marks."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    start = text.index(begin) + len(begin)
    return f"{text[:start]}{inside}\n{text[text.index(end) :]}"


if __name__ == "__main__":
    PAGE.write_text(between(PAGE.read_text(), "rules", table()))
