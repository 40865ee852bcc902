"""The ``http`` check: a service of yours decides, one POST a question.

The question is a JSON object; keys are never missing:

``{"type": "check", "check": NAME, "stage": "client" | "sender" | "recipient" | "content",
"listener": …, "client": {…}, "sender": … | null, "recipient": {"address", "params"} | null,
"message": {"id", "size", "recipients": […], "checks": {…}, "content": base64} | null}``

with ``client`` as in the standard webhook body, signed in the same way, the id fresh for every
question. The answer is 204, or 200 and ``{"reply": "550 5.1.1 no such user", "facts": …}``: a
4yz or 5yz reply refuses, none lets pass, ``facts`` are kept under the name of the check.

Invariant: everything else (another status, another body, no answer by ``timeout``) is a service
that does not work, and the operator's ``on_error`` decides: ``defer`` (451) or ``accept``.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

import orjson

from .. import __version__
from ..contracts import Question, Stage, Verdict
from ..message import Message
from ..mime.formats.standard import client_facts
from ..net.addresses import not_public
from ..net.http import Answer, HttpFault, http_client
from ..net.signature import Signer
from ..reply import Reply
from ..sayable import OPTION, sayable

if TYPE_CHECKING:
    from ..config import HttpCheckConfig

#: Questions out at once; more wait, and that waiting counts in ``timeout``.
CONNECTIONS = 64
UNAVAILABLE = Reply(451, "4.3.0", "a policy service does not answer, try again later")

_REPLY = re.compile(r"([45]\d\d)(?: (.*))?", re.DOTALL)


class HttpCheck:
    """``type = "http"``. Raises ValueError for a secret that is no base64."""

    def __init__(self, name: str, config: HttpCheckConfig) -> None:
        self.name = name
        self.stages: frozenset[Stage] = frozenset(config.stages)
        self._url = config.url
        self._timeout = config.timeout
        self._accepts = config.on_error == "accept"
        self._signer = Signer([config.secret])
        self._http = http_client("direct", CONNECTIONS, not_public if config.addresses == "public" else None)

    async def judge(self, question: Question) -> Verdict:
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            body = await self._question(question, deadline)
            headers = [("content-type", "application/json"), ("user-agent", f"gateway-smtp/{__version__}")]
            headers += self._signer.headers(str(uuid.uuid4()), int(time.time()), [body])
            return _verdict(await self._http.post(self._url, headers, body, deadline))
        except HttpFault as fault:
            return self._broken(fault.reason)
        except ValueError as fault:
            return self._broken(str(fault))
        except TimeoutError:
            return self._broken("the question was not made in time")

    async def _question(self, question: Question, deadline: float) -> bytes:
        recipient = question.recipient
        message = None
        if question.message is not None:
            async with asyncio.timeout_at(deadline):
                message = await asyncio.to_thread(_message_facts, question.message)
        asked = {
            "type": "check",
            "check": self.name,
            "stage": question.stage,
            "listener": question.listener,
            "client": client_facts(question.client),
            "sender": question.sender,
            "recipient": {"address": recipient.address, "params": recipient.params} if recipient is not None else None,
            "message": message,
        }
        return orjson.dumps(asked, default=_plain, option=orjson.OPT_NON_STR_KEYS | OPTION)

    def _broken(self, reason: str) -> Verdict:
        return Verdict(None if self._accepts else UNAVAILABLE, {"error": reason[:200]})

    async def close(self) -> None:
        await self._http.close()


def _plain(value: Any) -> Any:
    try:
        return sayable(value)
    except TypeError:
        return str(value)


def _message_facts(message: Message) -> dict[str, Any]:
    return {
        "id": message.id,
        "size": message.stored.size,
        "recipients": [recipient.address for recipient in message.envelope.recipients],
        "checks": message.checks,
        "content": base64.b64encode(message.content).decode(),
    }


def _verdict(answer: Answer) -> Verdict:
    """What the service says. Raises ValueError for what is no answer of ours."""
    if answer.status == 204:
        return Verdict()
    if answer.status != 200:
        raise ValueError(f"HTTP {answer.status}")
    if not answer.whole:
        raise ValueError("the answer is too long")
    try:
        said = orjson.loads(answer.body)
    except ValueError:
        raise ValueError("the answer is not JSON") from None
    if not isinstance(said, dict):
        raise ValueError("the answer is not an object")
    text = said.get("reply")
    if text is None:
        return Verdict(None, said.get("facts"))
    match = _REPLY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError('"reply" is not like "550 5.1.1 no such user"')
    return Verdict(Reply.untrusted(int(match[1]), match[2] or "refused by policy"), said.get("facts"))
