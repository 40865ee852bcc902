"""``gateway send``: what it says, what it makes of the replies, what it exits with."""

from __future__ import annotations

import email
import email.policy
import io
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from gateway.tools.send import make_mail, run, send

from ..servers import Upstream, free_port

MAIL = b"Subject: dots\r\n\r\n.one\r\n..two\r\n.\r\n"


def test_the_mail_it_makes_is_multipart_with_an_attachment() -> None:
    content = make_mail("ada@client.example", ["grace@us.example", "bcc@us.example"])
    assert b"\n" not in content.replace(b"\r\n", b"")
    mail = email.message_from_bytes(content, policy=email.policy.default)
    assert mail["From"] == "ada@client.example"
    assert mail["To"] == "grace@us.example, bcc@us.example"
    text, html = mail.get_body(("plain",)), mail.get_body(("html",))
    assert text is not None
    assert html is not None
    assert "ümlaut" in text.get_content()
    assert "<p>It has" in html.get_content()
    (attachment,) = mail.iter_attachments()
    assert attachment.get_filename() == "every-octet.bin"
    assert attachment.get_content() == bytes(range(256)) * 4


@pytest.mark.parametrize("address", ["", "no-at-sign", '"a b"@us.example', "jürgen@us.example", "a\r\nBcc: x@y.z", "<>@us.example"])
def test_no_address_breaks_its_header(address: str) -> None:
    mail = email.message_from_bytes(make_mail(address, [address]), policy=email.policy.default)
    assert mail["Bcc"] is None
    assert len(mail.get_all("To", [])) == 1


def test_content_arrives_octet_for_octet_and_the_dialogue_is_told(upstream: Upstream) -> None:
    told: list[str] = []
    result = send(upstream.address, "a@client.example", ["b@us.example", "c@us.example"], MAIL, helo="client.example", say=told.append)
    assert result.accepted
    assert result.replies == [(250, "2.0.0 taken")]
    (taken,) = upstream.wait(1)
    assert taken.content == MAIL
    assert taken.mail == f"<a@client.example> SIZE={len(MAIL)}"
    assert taken.recipients == ["<b@us.example>", "<c@us.example>"]
    assert told[:3] == ["< 220 upstream.test ESMTP", "> EHLO client.example", "< 250-upstream.test"]
    assert told[-2:] == ["> QUIT", "< 221 2.0.0 bye"]
    assert f"> ({len(MAIL)} octets of content, then a dot)" in told


def test_a_content_without_a_last_line_end_and_an_empty_one(upstream: Upstream) -> None:
    assert send(upstream.address, "", ["b@us.example"], b"no end").accepted
    assert send(upstream.address, "", ["b@us.example"], b"").accepted
    assert [taken.content for taken in upstream.wait(2)] == [b"no end\r\n", b""]
    assert upstream.taken[0].mail.startswith("<> ")


def test_what_is_offered_is_used_and_nothing_else() -> None:
    with Upstream() as rich, Upstream(offers=()) as poor:
        for server in (rich, poor):
            assert send(server.address, "jürgen@client.example", ["b@us.example"], "Grüße\r\n".encode()).accepted
        assert rich.wait(1)[0].mail == "<jürgen@client.example> SIZE=9 BODY=8BITMIME SMTPUTF8"
        assert poor.wait(1)[0].mail == "<jürgen@client.example>"


def test_a_server_without_ehlo_gets_helo(upstream: Upstream) -> None:
    upstream.refuse["EHLO"] = "502 5.5.1 what is that?"
    assert send(upstream.address, "a@client.example", ["b@us.example"], MAIL, helo="me.example").accepted
    assert upstream.lines[:2] == ["EHLO me.example", "HELO me.example"]


def test_lmtp_answers_for_every_recipient() -> None:
    with Upstream(lmtp=True) as server:
        result = send(server.address, "a@client.example", ["b@us.example", "c@us.example"], MAIL, protocol="lmtp")
        assert result.accepted
        assert len(result.replies) == 2
        assert server.lines[0].startswith("LHLO ")


@pytest.mark.parametrize(
    ("line", "refused"), [("MAIL", {"b@us.example", "c@us.example"}), ("RCPT TO:<c@", {"c@us.example"}), ("DATA", set()), (".", set())]
)
def test_a_refusal_is_a_result(upstream: Upstream, line: str, refused: set[str]) -> None:
    upstream.refuse[line] = "550 5.7.1 not today"
    result = send(upstream.address, "a@client.example", ["b@us.example", "c@us.example"], MAIL)
    assert not result.accepted
    assert not result.failure
    assert set(result.refused) == refused
    if not refused:
        assert result.replies == [(550, "5.7.1 not today")]


def test_nobody_there() -> None:
    result = send(f"127.0.0.1:{free_port()}", "a@client.example", ["b@us.example"], MAIL)
    assert "refused" in result.failure.lower()
    assert not result.accepted


@pytest.mark.parametrize(("said", "failure"), [(b"", "closed"), (b"hello there\r\n", "no SMTP reply"), (b"554 go away\r\n", "554 go away")])
def test_a_server_that_does_not_speak_smtp(said: bytes, failure: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(100)
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        result = send(f"127.0.0.1:{listener.getsockname()[1]}", "a@client.example", ["b@us.example"], MAIL, timeout=30)
        thread.join(30)
    assert failure in result.failure


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            connection.sendall(b"421 4.3.2 closing\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert "421 4.3.2 closing" in send(f"unix:{path}", "a@client.example", ["b@us.example"], MAIL).failure
        thread.join(30)


def test_the_command(upstream: Upstream, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    attachment, message = tmp_path / "notes.txt", tmp_path / "mail.eml"
    attachment.write_bytes(b"noted\n")
    message.write_bytes(b"Subject: from a file\n\nline\r\nline\n")
    assert run(upstream.address, "a@client.example", ["b@us.example"], subject="mine", text="words", attachments=[attachment]) == 0
    assert "> MAIL FROM:<a@client.example>" in capsys.readouterr().out
    assert run(upstream.address, "a@client.example", ["b@us.example"], message=message, quiet=True) == 0
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"Subject: from a pipe\n\n")))
    assert run(upstream.address, "a@client.example", ["b@us.example"], message=Path("-"), quiet=True) == 0
    assert capsys.readouterr().out == ""
    made, file, pipe = upstream.wait(3)
    mail = email.message_from_bytes(made.content, policy=email.policy.default)
    assert mail["Subject"] == "mine"
    assert [part.get_filename() for part in mail.iter_attachments()] == ["notes.txt"]
    assert file.content == b"Subject: from a file\r\n\r\nline\r\nline\r\n"
    assert pipe.content == b"Subject: from a pipe\r\n\r\n"

    upstream.refuse["RCPT"] = "550 5.1.1 nobody"
    assert run(upstream.address, "a@client.example", ["b@us.example"]) == 1
    assert run(upstream.address, "a@client.example", ["b@us.example>\r\nRSET"]) == 2
    assert run("nonsense", "a@client.example", ["b@us.example"]) == 2
    assert run(upstream.address, "a@client.example", ["b@us.example"], message=tmp_path / "absent") == 2
    assert run(f"127.0.0.1:{free_port()}", "a@client.example", ["b@us.example"], quiet=True) == 1
    assert "refused" in capsys.readouterr().err.lower()
