"""What a ServerSession is told and what it tells: Rules in, events out.

Plain values, no behaviour. The session in ``server.py`` says when each event comes; whoever
drives it carries them out in their order. Those of every mail have a written ``__init__``: where this
is compiled, one that dataclass makes would be interpreted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mypy_extensions import mypyc_attr

from ..contracts import Login, Question, Transaction
from ..message import Client
from ..reply import Reply
from ..route import Routes
from ..senders import Senders
from .extensions import NOTHING, Extensions

Stage = Literal["connect", "auth", "mail", "recipient", "data", "command"]


@dataclass
class Rules:
    """What a listener asks of its sessions. Shared by them, replaced whole on reload;
    only ``shortage`` changes in place.

    ``message_size`` in octets. ``binarymime``: every route's sink carries it; ``dsn``: somebody
    carries reports; ``requiretls``: the sinks of some route keep it, and clients under TLS may ask
    for it. ``null_sender_recipients``: of a mail from <>, None: as of any other. ``client_checks``,
    ``sender_checks``: names of the checks of that stage, for all mail; ``recipient_checks``: which
    names among ``Route.checks`` speak at the recipient stage. ``shortage``: MAIL is refused with
    it, and with a 421 every new connection. ``mechanisms``: those of AUTH, the best first;
    ``auth_without_tls``: also in clear. ``senders``: who may send as whom, None: anybody.
    ``certificates``: users by a name of their client certificate (``TLS.names``); who has one is that user
    at once (``certificate_identity = "implied"``), or once it said AUTH EXTERNAL."""

    hostname: str
    routes: Routes
    protocol: Literal["smtp", "submission", "lmtp"] = "smtp"
    message_size: int = 25 * 2**20
    recipients: int = 1000
    null_sender_recipients: int | None = None
    hops: int = 100
    long_lines: Literal["accept", "reject"] = "accept"
    bare_newlines: Literal["reject", "disconnect", "normalize"] = "reject"
    tls: Literal["off", "starttls", "required", "implicit"] = "off"
    auth: Literal["off", "offered", "required"] = "off"
    auth_without_tls: bool = False
    mechanisms: tuple[str, ...] = ()
    senders: Senders | None = None
    certificates: Mapping[str, str] = field(default_factory=dict)
    certificate_identity: Literal["off", "external", "implied"] = "off"
    binarymime: bool = True
    dsn: bool = True
    requiretls: bool = False
    extensions: Extensions = NOTHING
    client_checks: tuple[str, ...] = ()
    sender_checks: tuple[str, ...] = ()
    recipient_checks: frozenset[str] = frozenset()
    shortage: Reply | None = None


# ----------------------------------------------------------------------- events


@dataclass
class Asked:
    """These checks must be run; the session waits for ``verdict``."""

    question: Question
    checks: tuple[str, ...]


@dataclass
class ClientAsked(Asked):
    """Before the greeting."""


@dataclass
class SenderAsked(Asked):
    """MAIL is well formed."""


@dataclass
class RecipientAsked(Asked):
    """RCPT has a route."""


@mypyc_attr(acyclic=True, free_list_len=1)
@dataclass(init=False)
class MailStarted:
    """The recipients stand; content comes."""

    transaction: Transaction

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction


@mypyc_attr(acyclic=True, free_list_len=1)
@dataclass(init=False)
class MailContent:
    """The next piece of content: the parser's own object, never empty."""

    number: int
    octets: bytes

    def __init__(self, number: int, octets: bytes) -> None:
        self.number = number
        self.octets = octets


@mypyc_attr(acyclic=True, free_list_len=1)
@dataclass(init=False)
class MailFinished:
    """The content is whole and the wire is content with it; the facts of the transaction are
    set. ``answer(number, …)`` is owed."""

    number: int

    def __init__(self, number: int) -> None:
        self.number = number


@mypyc_attr(acyclic=True, free_list_len=1)
@dataclass(init=False)
class MailAborted:
    """A started mail will never finish."""

    number: int

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass
class Refused:
    """A 4yz or 5yz was said; ``address`` as the client gave it, where there is one."""

    stage: Stage
    reply: Reply
    address: str | None


@dataclass
class ClientNamed:
    """XCLIENT: whoever is connected speaks for this client, and the conversation begins anew with
    it. ``name``: its host name, "" if it is not known."""

    client: Client
    name: str


@dataclass
class LoginRefused(Refused):
    """A login came to nothing: nobody's credentials, or too many failures before. ``user`` as
    claimed; ``note``: the reason, for the log."""

    mechanism: str
    user: str
    note: str


@dataclass
class LoggedIn:
    """From now on the client is this user: 235 was said, or (``mechanism`` is ``certificate``) its certificate says so."""

    mechanism: str
    user: str


@dataclass
class AuthWanted:
    """This login must be judged; the session waits for ``judged``."""

    login: Login


@dataclass
class TLSWanted:
    """The client said STARTTLS and may have it: answer with ``secure``."""


Event = Asked | MailStarted | MailContent | MailFinished | MailAborted | Refused | ClientNamed | AuthWanted | LoggedIn | TLSWanted
