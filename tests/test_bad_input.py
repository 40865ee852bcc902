"""The table of hostile and broken input: what is answered, and which test shows it.

Each row has an id that replies, transcripts and docs/security.md go by. A name without ``.py`` is
a transcript: it runs whole, byte by byte and at every cut between two waits, with answers at once
and late (``unit/test_transcripts.py``), and over sockets against the whole gateway
(``integration/test_dialogues.py``). What holds for every row (one reply a command, none before
the true end, nothing kept of what was refused, any cutting) is judged by the runner of the
transcripts and by ``properties/test_session.py`` for any words in any order."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent

#: The rows as the table numbers them.
TABLE = [
    *(f"F{number}" for number in range(1, 11)),
    *(f"C{number}" for number in range(1, 11)),
    *("P1", "P2", "P3", "T1", "T2", "T3", "T4", "T5", "B1", "B2", "B3", "R1", "R2", "R3", "L1", "L2", "L3"),
    *("M1", "M2", "W1", "W2", "O1", "A1", "A2", "A3", "S1", "LMTP"),
]

SERVER = "unit/test_server.py::"
LISTENER = "unit/test_listener.py::"
TLS = "unit/test_listener_tls.py::"
PARSER = "unit/test_parser.py::"
DOOR = "unit/test_door.py::"
USERS = "unit/test_users.py::"
LIMITS = "mime/test_limits.py::"
HOSTILE = "integration/test_hostile.py::"
TOOLS = "integration/test_outside_tools.py::"
ADDRESSES = "unit/test_http_addresses.py::"
MISBEHAVIOUR = "integration/test_misbehaviour.py::"
RELAY = "unit/test_relay.py::"
CLIENT = "unit/test_client.py::"

#: What a row says, clause by clause, and where it is shown.
ROWS: dict[str, dict[str, list[str]]] = {
    "F1": {
        "ten false ends in DATA, behind text, first after 354 and over the size: 550 5.5.2 at the true end, nothing stored": [
            "F1-smuggling"
        ],
        "what stands behind a false end is no command; the connection goes on": ["F1-smuggling", "F1-pipelined-behind"],
        "bare_newlines = disconnect: 521 and the end, at the true end": ["F1-disconnect", "F1-disconnect-bdat", "F1-disconnect-lmtp"],
        "at every place of the parser's blocks": [
            PARSER + "test_a_false_end_ends_nothing_and_is_a_fault",
            PARSER + "test_after_a_fault_nothing_is_handed_out_and_the_true_end_is_found",
        ],
        "on the way out: nothing we send ends in a next hop's eyes before it does": [
            HOSTILE + "test_what_a_false_end_becomes_ends_nothing_further_on"
        ],
    },
    "F2": {
        "a bare LF or CR anywhere": ["F2-bare-newline", "B3-newlines"],
        "normalize: LF is CRLF, a CR is refused, only CRLF.CRLF ends": ["F2-normalize", "F2-normalize-cr", "F2-normalize-bdat"],
    },
    "F3": {
        "NUL ends nothing and is 550 5.6.0, also between CR and LF": ["F3-nul", "F3-nul-in-newline"],
        "BINARYMIME carries it": ["F3-nul-binarymime"],
    },
    "F4": {"before the true end 550, behind it 500 at the next CRLF": ["F4-nul-before-end", "F4-nul-after-end"]},
    "F5": {"empty content": ["F5-empty"]},
    "F6": {
        "one leading dot is taken off": ["F6-dots", "B3-dots"],
        "and put on again on the way out; the octets delivered are the same": [
            CLIENT + "test_dots_and_a_last_line_without_end",
            "integration/test_corpus.py::test_by_data",
        ],
    },
    "F7": {
        "an end that never comes: 421 4.4.2 at the deadline, nothing stored": [
            SERVER + "test_f7_content_that_never_ends",
            LISTENER + "test_an_end_of_data_that_never_comes",
        ]
    },
    "F8": {
        "long lines are carried as they are": ["F8-long-line"],
        "memory stays bounded for one of 64 MiB": [
            PARSER + "test_a_line_of_64_mib_costs_no_memory",
            SERVER + "test_a_64_mib_line_is_carried_and_never_held",
            HOSTILE + "test_a_line_of_64_mib_is_carried_and_costs_no_memory",
        ],
        "long_lines = reject: 550 5.6.0 at the end": ["F8-long-line-reject", "F8-long-line-just-right"],
        "over the size: read to the true end": ["F8-oversize"],
    },
    "F9": {
        "8-bit content is taken and flagged": ["F9-eight-bit"],
        "a hop that cannot carry it: 5.6.3, never re-encoded": [
            "integration/test_upstreams.py::test_what_the_next_hop_cannot_carry_fails_and_is_not_re_encoded"
        ],
    },
    "F10": {
        "FIN, RST in the middle of DATA and BDAT: discarded": [
            "F10-end-in-data",
            "F10-end-in-bdat",
            "F10-end-between-chunks",
            LISTENER + "test_the_client_goes_in_the_middle_of_content",
        ],
        "close_notify there, with clear octets behind it": [
            "F10-close-notify-in-data",
            "F10-close-notify-in-bdat",
            TLS + "test_close_notify_in_the_middle_of_content",
        ],
        "nothing to report for AddressSanitizer and UBSan": [HOSTILE + "test_rows_under_a_sanitizer"],
    },
    "C1": {"bare LF, CR, NUL, controls: 500 5.5.2; the third ends the session": ["C1-bare-lf", "C1-control", "C1-thrice"]},
    "C2": {
        "512 and 2048 octets pass, 2049 are 500 once": ["C2-length", "C2-too-long"],
        "64 KiB without CRLF: 421": ["C2-flood", PARSER + "test_memory_of_a_flood_is_bounded"],
    },
    "C3": {"AUTH lines up to 12,288 octets; above 500 5.5.6": ["C3-response", "C3-command", "C3-flood", "C3-malformed"]},
    "C4": {"550 5.6.7 and 553 5.6.7 without SMTPUTF8; no UTF-8: 500": ["C4-utf8-sender", "C4-utf8-recipient", "C4-not-utf8"]},
    "C5": {
        "501 5.1.7 and 501 5.1.3 for what is no address": ["C5-addresses", "C5-no-keyword", "C6-data-argument"],
        "each limit to the octet": ["C5-limits", PARSER + "test_a_path_has_256_octets_with_its_brackets"],
        "odd and long local parts are good": ["C5-good-addresses", "C7-case"],
        "parameters: unknown 555, malformed or twice 501, SIZE over the limit 552": [
            "C5-parameters",
            "C5-recipient-parameters",
            "C5-dsn-not-offered",
            "C5-binarymime-not-offered",
        ],
    },
    "C6": {
        "503 5.5.1 out of order; DATA for nobody 554": ["C6-order", "C6-refused-recipients", "C6-reset", "C6-data-argument"],
        "STARTTLS and AUTH within a transaction": ["T2-refused", "T5-order"],
    },
    "C7": {"unknown 500; EXPN, TURN, ETRN 502": ["C7-unknown", "C7-case"]},
    "C8": {
        "VRFY says 252 to everybody, and is counted": ["C8-vrfy", "C9-junk"],
        "nmap finds nobody": [TOOLS + "test_nmap_finds_no_users"],
    },
    "C9": {
        "from the eleventh error on a second late, the twentieth is 421": ["C9-errors", SERVER + "test_the_tarpit_withholds_and_stops"],
        "a hundred junk commands are free": ["C9-junk", "C9-chunks"],
        "refused recipients and what follows from a refusal are no errors": ["C9-refused-recipients", "C9-follow-ups"],
        "an accepted message wipes the slate": ["C9-anew", "C9-behind", "C9-not-anew"],
        "the tarpit holds nobody else": [LISTENER + "test_the_tarpit_holds_one_and_nobody_else"],
    },
    "C10": {
        "HTTP, a header, TLS on a clear port: one reply and the end": ["C10-other-protocol", "C10-tls"],
        "clear text at an implicit listener": [TLS + "test_clear_smtp_at_an_implicit_listener"],
    },
    "P1": {
        "octets before the greeting: 554 and the end": [
            "P1-early-talker",
            LISTENER + "test_octets_before_the_greeting",
            TLS + "test_who_talks_before_the_greeting_under_implicit_tls",
            DOOR + "test_who_talks_in_the_delay_is_turned_away",
        ]
    },
    "P2": {
        "behind EHLO, DATA, STARTTLS, AUTH, a bad BDAT: 554 and the end": ["P2-before-reply", "P2-auth", "P2-auth-response"],
        "who said HELO may not pipeline": ["P2-helo", "P2-helo-content", "P2-helo-bdat"],
    },
    "P3": {
        "a group may begin with the end of content": ["P3-pipelined", "P3-many-transactions"],
        "content before the 354 left": [SERVER + "test_content_before_354_left", "P2-before-reply"],
    },
    "T1": {
        "octets behind STARTTLS: 554 and the end, no handshake": [
            "T1-injection",
            "T1-behind-mail",
            TLS + "test_octets_that_are_there_before_the_220",
        ],
        "octets that race the handshake": [TLS + "test_clear_octets_that_race_the_handshake"],
        "STARTTLS within content is no command": ["T1-not-in-content"],
    },
    "T2": {
        "syntax, state, a second one": ["T2-refused", "T2-not-offered", "T2-behind-mail", "T2-lmtp"],
        "all from before TLS is forgotten": ["T2-forgotten", "T2-helo-forgotten", "T2-login-forgotten"],
    },
    "T3": {
        "AUTH in clear is neither offered nor taken": ["T3-clear"],
        "where TLS is demanded all else is 530": ["T3-required", "T3-required-mail", "T3-implicit"],
    },
    "T4": {
        "SSL 2 and 3, TLS 1.0 and 1.1: an alert and the end": [TLS + "test_ssl_is_none_any_more", TLS + "test_old_versions_get_an_alert"],
        "renegotiation: an alert and the end; no endless change of keys": [
            TLS + "test_no_renegotiation",
            TLS + "test_changes_of_keys_without_end",
            TLS + "test_keys_may_be_changed",
        ],
        "a handshake has one deadline, and less under stress": [
            TLS + "test_a_handshake_that_stalls_is_closed",
            TLS + "test_a_handshake_that_drips_has_one_deadline",
            TLS + "test_under_stress_a_handshake_has_less_time",
        ],
        "certificates change under load, no handshake fails": [
            TLS + "test_certificates_change_under_handshakes",
            "integration/test_tls_clients.py::test_hangup_under_load",
        ],
        "testssl.sh finds nothing, nor anything that OpenSSL's own server has not": [
            TOOLS + "test_testssl",
        ],
    },
    "T5": {
        "base64, *, wrong, twice, order": ["T5-faults", "T5-cancel", "T5-order", "T5-before-ehlo", "T5-second-step", "T5-scram-wrong"],
        "the third failure ends the session": ["T5-three-failures"],
        "in the same time": [USERS + "test_a_user_that_is_not_costs_what_one_that_is_does"],
        "locks by address and by user grow: 454": [
            "unit/test_lockout.py::test_an_address_waits_twice_as_long_each_time",
            "unit/test_lockout.py::test_a_user_waits_whether_it_exists_or_not",
            USERS + "test_whoever_guesses_is_locked_out_even_with_the_right_password",
        ],
        "NUL, CR, LF in names: 501": ["T5-faults", "properties/test_auth.py::test_a_mechanism_never_raises_and_names_are_clean"],
        "what is good goes well": ["T5-exchange", "T5-lmtp", "T5-logins", "T5-offer", "T5-scram", TOOLS + "test_swaks_auth"],
        "who may send as whom": ["T5-senders", "T5-own-address", "T5-not-logged-in"],
    },
    "B1": {"a size that nobody can read: 501 and the end": ["B1-bad-size", PARSER + "test_bdat_of_unknown_size"]},
    "B2": {"a chunk out of order is read over to the octet": ["B2-out-of-order", "B2-after-error"]},
    "B3": {
        "DATA and BDAT do not mix; BINARYMIME wants BDAT": ["B3-mixing"],
        "over the limit in sum, by one chunk": ["B3-limit", "B3-single-chunk"],
        "BDAT 0 LAST, RSET, newlines": ["B3-empty-last", "B3-reset", "B3-newlines", "B3-dots"],
    },
    "R1": {
        "odd recipients, and nmap's sixteen": ["R1-relay-probes", "R1-nmap", "R1-no-address", TOOLS + "test_nmap_finds_no_open_relay"],
        "where mailboxes are named, others do not exist": ["R1-mailboxes"],
        "toward a relay no %, ! or @; toward a webhook as they stand": [
            "R1-odd-local-parts",
            "R1-taken-as-they-stand",
            "unit/test_words.py::test_odd_local_parts_never_reach_a_relay",
        ],
        "Postmaster is ours": ["R1-postmaster", "R1-no-postmaster"],
    },
    "R2": {
        "501 where it is no atext, else a name like others": ["R2-not-atext", "R2-shell", "R2-control", "R2-newline"],
        "strace: nothing is executed, no path is built from it": [HOSTILE + "test_nothing_is_executed_and_no_path_is_built_from_input"],
    },
    "R3": {
        "XCLIENT, XFORWARD, PROXY of strangers": ["R3-not-from-you", "R3-proxy", DOOR + "test_a_header_from_anybody_else"],
        "no header, a bad, a long, a late one: no greeting": [
            DOOR + "test_no_header_no_greeting",
            DOOR + "test_the_deadline_is_not_moved_by_a_drip",
            DOOR + "test_any_octets_at_all_are_never_greeted",
        ],
    },
    "L1": {
        "too many Received: 554 5.4.6": ["L1-hops"],
        "our own trace too often": ["unit/test_intake.py::test_a_message_that_went_through_here_too_often_is_a_loop"],
    },
    "L2": {
        "nobody writes to the null sender": [
            "unit/test_intake.py::test_a_null_sender_gets_no_bounce_ever",
            "unit/test_queue.py::test_a_bounce_that_cannot_be_delivered_is_a_dead_letter",
            "L2-null-sender",
        ],
        "null_sender_recipients = 1: 452 for the second": ["L2-one-recipient"],
    },
    "L3": {"recipients over the limit are 452, the others go": ["L3-recipients", "L3-other-promise"]},
    "M1": {
        "taking apart stops at each limit, the mail is delivered": [
            LIMITS + "test_a_header_over_its_limit_leaves_the_mail_in_one_piece",
            LIMITS + "test_over_2000_fields",
            LIMITS + "test_over_1000_parts",
            LIMITS + "test_over_100_deep",
            LIMITS + "test_a_boundary_over_2048_octets",
            LIMITS + "test_a_2231_index_over_999",
            LIMITS + "test_over_10240_address_tokens",
            LIMITS + "test_comments_over_50_deep",
        ],
        "parameters of all parts together, and a row of semicolons": [
            LIMITS + "test_parameters_of_all_parts_have_a_limit_together",
            LIMITS + "test_a_row_of_semicolons_is_gone_over_once",
        ],
        "twice the size, no more than twice the time; three times its memory": [
            "mime/test_costs.py::test_twice_as_much_costs_twice_as_much",
            "mime/test_costs.py::test_memory_is_three_times_the_mail_at_most",
        ],
    },
    "M2": {
        "decoded CR, LF and NUL stay data": [
            "properties/test_mime.py::test_nothing_raises_and_everything_can_be_told",
            "unit/test_http.py::test_a_header_of_two_lines_is_refused",
            "unit/test_webhook.py::test_no_address_becomes_a_second_header",
            "unit/test_bounce.py::test_no_text_gets_in_with_a_line_of_its_own",
            "mime/test_formats.py::test_addresses_in_header_fields",
        ]
    },
    "W1": {
        "redirects are never followed": [
            "unit/test_http.py::test_redirects_are_told_and_not_followed",
            ADDRESSES + "test_a_redirect_to_a_forbidden_address_is_not_followed",
        ],
        "each kind of address that is not public, however it is written": [
            "unit/test_addresses.py::test_not_public",
            "unit/test_addresses.py::test_an_address_inside_an_address_is_the_one_that_is_judged",
            ADDRESSES + "test_no_notation_of_a_forbidden_address_gets_through",
        ],
        "judged at connect time on the resolved address; no octet leaves": [
            ADDRESSES + "test_a_name_is_judged_by_its_address",
            ADDRESSES + "test_of_several_addresses_each_is_judged",
            ADDRESSES + "test_a_name_that_changes_its_address_between_look_and_connection",
        ],
        "deferred, and the log says why": [ADDRESSES + "test_a_webhook_that_may_be_public_alone_defers_and_says_why"],
    },
    "W2": {
        "each misbehaviour is bounded, none is a delivery": [
            "unit/test_http.py::test_what_is_no_whole_answer_is_a_fault_within_the_deadline",
            "unit/test_http.py::test_of_an_endless_answer_a_bounded_part_is_read",
            "unit/test_http.py::test_nothing_is_decompressed",
            "unit/test_http.py::test_an_answer_to_nothing_does_not_answer_the_next_request",
            "unit/test_webhook.py::test_no_misbehaving_receiver_counts_as_delivered",
            "unit/test_webhook.py::test_what_each_status_means_for_the_mail",
        ],
        "through the whole gateway, its spool and its numbers": [
            MISBEHAVIOUR + "test_no_misbehaving_receiver_counts_as_delivered",
            MISBEHAVIOUR + "test_a_200_before_the_body_was_sent_does_not_count_as_delivered",
        ],
    },
    "O1": {
        "each misbehaviour is bounded and defers": [
            RELAY + "test_an_upstream_that_misbehaves_defers_in_bounded_time",
            RELAY + "test_memory_is_bounded_while_an_upstream_floods",
            CLIENT + "test_whatever_is_said_nothing_counts_as_delivered_that_was_not",
            CLIENT + "test_octets_before_the_handshake_are_an_offence",
        ],
        "through the whole gateway, its spool and its numbers": [MISBEHAVIOUR + "test_no_misbehaving_upstream_counts_as_delivered"],
        "its words are cleaned": [CLIENT + "test_words_of_an_upstream_are_cleaned"],
    },
    "A1": {
        "too little room, too few inodes: 452 at MAIL": [
            "unit/test_app.py::test_no_room_is_told_before_mail",
            "unit/test_app.py::test_the_room_that_must_be",
            "crash/test_faults.py::test_too_little_room_is_unhealthy_until_there_is_more",
        ],
        "the disk fills up within DATA: read to the end, then 452": [
            HOSTILE + "test_a_disk_that_fills_up_within_data",
            "unit/test_intake.py::test_a_disk_that_takes_no_content",
        ],
        "a spool in trouble: 421 instead of the greeting": ["unit/test_app.py::test_a_spool_in_trouble_takes_no_connections"],
    },
    "A2": {
        "memory: content goes to files, then reading stops": [
            "unit/test_intake.py::test_over_the_memory_budget_small_content_goes_to_files_too",
            "unit/test_intake.py::test_the_memory_budget_holds_for_content_that_stands_still",
            LISTENER + "test_a_full_draft_stops_reading",
        ],
        "connections: 421": [
            LISTENER + "test_more_connections_than_there_is_room_for",
            LISTENER + "test_connections_are_counted_by_client",
        ],
        "descriptors: 421, and no spin": [
            LISTENER + "test_no_descriptor_left",
            "integration/test_gateway_process.py::test_out_of_descriptors",
        ],
        "shorter deadlines": [LISTENER + "test_under_stress_time_outs_are_short"],
    },
    "A3": {
        "drips and pauses end at their deadlines": [
            LISTENER + "test_content_that_drips",
            LISTENER + "test_a_command_that_drips",
            LISTENER + "test_silence_between_commands",
            LISTENER + "test_a_client_that_does_not_read",
        ]
    },
    "S1": {
        "one line of JSON an event, escaped and cut": [
            "unit/test_observe.py::test_hostile_values_stay_values",
            "unit/test_observe.py::test_whatever_is_said_is_one_line",
            "unit/test_observe.py::test_long_values_are_cut_and_long_lines_stay_bounded",
            HOSTILE + "test_what_clients_call_themselves_stays_one_line_of_the_log",
        ]
    },
    "LMTP": {"a reply for each recipient, in order; HELO and EHLO are 500": ["LMTP-replies", "LMTP-refused", "LMTP-order"]},
}

TRANSCRIPTS = {path.stem for path in (HERE / "transcripts").glob("*.smtp")}


@cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((HERE / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")}


def exists(name: str) -> bool:
    path, colons, test = name.partition("::")
    return test in functions_of(path) if colons else name in TRANSCRIPTS


@pytest.mark.parametrize("row", TABLE)
def test_every_clause_of_a_row_is_shown(row: str) -> None:
    assert ROWS.get(row), f"nothing shows row {row}"
    for clause, names in ROWS[row].items():
        assert names, f"{row}: nothing shows {clause!r}"
        gone = [name for name in names if not exists(name)]
        assert not gone, f"{row}, {clause!r}: there is no {gone}"


def test_no_row_is_made_up() -> None:
    assert set(ROWS) == set(TABLE)


def test_every_transcript_of_a_row_stands_in_it() -> None:
    """What is named after no row is no hostile input."""
    listed = {name for clauses in ROWS.values() for names in clauses.values() for name in names}
    strays = sorted(name for name in TRANSCRIPTS - listed if name.partition("-")[0] in TABLE)
    assert not strays, strays


def test_security_says_which_table_it_means() -> None:
    assert "tests/test_bad_input.py" in (HERE.parent / "docs" / "security.md").read_text()
