"""Which reply answers what: reads both sides of a conversation, by the oracle alone.

A ``Walk`` is given what the client and the server said so far, and pairs every command, every
content and every line of a login with its reply (RFC 5321 §4.2: exactly one; RFC 2033 §4.2: in
LMTP one per accepted recipient after the end of data). It knows no session: both must agree
with it, the server's on what a client says, the client's on what an upstream says.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .. import reference

#: Octets of a line of a login, CRLF included.
RESPONSE_LIMIT = 12290


@dataclass
class Letter:
    """One transaction as the wire tells it. Codes are those of the replies; ``content`` is what was
    carried, and ``finals`` what its end was answered with so far."""

    sender: str
    code: int
    binary: bool = False
    tried: list[tuple[str, int]] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    content: bytes | None = None
    finals: list[int] = field(default_factory=list)

    @property
    def recipients(self) -> list[str]:
        """Those that were accepted, in order."""
        return [address for address, code in self.tried if code < 300]


class Walk:
    """``replies`` that answer nothing yet and commands that have no reply yet are both kept: who
    waits for whom shows ``owed`` and ``spare``."""

    def __init__(self, lmtp: bool = False, auth_limit: int = 0, normalize: bool = False, hostname: str = "") -> None:
        self.lmtp = lmtp
        self.auth_limit = auth_limit
        self.normalize = normalize
        self.hostname = hostname
        self.letters: list[Letter] = []
        self.commands: list[reference.Said] = []
        self.way = "command"
        self._client = b""
        self._replies: deque[int] = deque()
        self._letter: Letter | None = None
        self._chunks: bytes | None = None
        self._unanswered = 0  # replies to an end of data that are to come

    def hear(self, client: bytes, replies: list[int]) -> None:
        self._client += client
        self._replies += replies
        while self._step():
            pass

    @property
    def spare(self) -> list[int]:
        """Replies to nothing."""
        return list(self._replies)

    @property
    def owed(self) -> bool:
        """Something whole has no reply."""
        if self.way == "answers":
            return True
        if self.way == "content":
            return reference.content(self._client, self.normalize).finished
        line = reference.cut_line(self._client, RESPONSE_LIMIT)
        if line is None or self.way == "tls":
            return False
        found = reference.first_command(self._client, auth_limit=self.auth_limit)
        assert found is not None
        said, rest = found
        return self.way != "command" or said.verb != "BDAT" or said.fault is not None or len(rest) >= said.chunk_size

    def secured(self) -> None:
        """The handshake is over: nothing that was said in clear counts."""
        assert self.way == "tls"
        assert not self._client
        self.way = "command"
        self._forget()

    def _forget(self) -> None:
        self._letter = None
        self._chunks = None

    def _step(self) -> bool:
        if self.way == "tls" or not self._replies:
            return False
        ways = {"command": self._command, "content": self._content, "answers": self._answers, "response": self._response}
        return ways[self.way]()

    def _command(self) -> bool:
        found = reference.first_command(self._client, auth_limit=self.auth_limit)
        if found is None:
            return False
        said, rest = found
        if said.verb == "BDAT" and said.fault is None:
            return self._chunk(said, rest)
        self._client = rest
        self.commands.append(said)
        code = self._replies.popleft()
        letter = self._letter
        match said.verb:
            case "MAIL" if said.fault is None and letter is None:
                binary = (said.params.get("BODY") or "").upper() == "BINARYMIME"
                made = Letter(said.address or "", code, binary)
                self.letters.append(made)
                if code < 300:
                    self._letter = made
            case "RCPT" if letter is not None:
                address = said.address or "" if said.domain else f"{said.local}@{self.hostname}"
                letter.tried.append((address, code))
            case "DATA" if code == 354:
                self.way = "content"
            case "DATA" if letter is not None:
                letter.refused.append(code)
            case "AUTH" if code == 334:
                self.way = "response"
            case "STARTTLS" if code == 220:
                self.way = "tls"
            case "RSET" | "EHLO" | "HELO" | "LHLO" | "XCLIENT" if code < 300:
                self._forget()
        return True

    def _response(self) -> bool:
        line = reference.cut_line(self._client, RESPONSE_LIMIT)
        if line is None:
            return False
        self._client = line[2]
        if self._replies.popleft() != 334:
            self.way = "command"
        return True

    def _content(self) -> bool:
        content = reference.content(self._client, self.normalize)
        if not content.finished:
            return False
        self._client = self._client[content.used :]
        self._end(content.octets)
        return True

    def _chunk(self, said: reference.Said, rest: bytes) -> bool:
        if len(rest) < said.chunk_size:
            return False
        self.commands.append(said)
        octets, self._client = rest[: said.chunk_size], rest[said.chunk_size :]
        letter = self._letter
        if letter is None:
            self._replies.popleft()
        elif not letter.recipients:
            # Read over: the transaction goes on.
            letter.refused.append(self._replies.popleft())
        else:
            self._chunks = (self._chunks or b"") + octets
            if said.last:
                self._end(reference.chunks(self._chunks, self.normalize, letter.binary, ended=True).octets)
                return True
            code = self._replies.popleft()
            if code >= 300:
                # Of a mail that had a chance it was the end.
                letter.refused.append(code)
                self._forget()
        return True

    def _end(self, octets: bytes) -> None:
        """The end of data was said; its answers follow."""
        letter = self._letter
        if letter is not None:
            letter.content = octets
        self._unanswered = max(len(letter.recipients), 1) if letter is not None and self.lmtp else 1
        self.way = "answers"

    def _answers(self) -> bool:
        code = self._replies.popleft()
        if self._letter is not None:
            self._letter.finals.append(code)
        self._unanswered -= 1
        if not self._unanswered:
            self.way = "command"
            self._forget()
        return True
