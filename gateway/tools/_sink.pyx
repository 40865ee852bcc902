# cython: auto_pickle=False, autotestdict=False, cdivision=True, emit_code_comments=False
"""The counting receivers' engine: lines and content, read as plainly as can be, and counted.

Its manual is ``_sink.pyi``. One wait serves all connections; a read is taken whole, and what is
answered to it goes out in one write. Where an answer must wait (``delay``, or a client that does not
read), the rest of the read is kept and nothing more is read from that client.

RFC 5321 §4.5.2 (the end of data), RFC 2920, RFC 3030 (BDAT), RFC 2033 (LMTP), RFC 9112 (HTTP/1.1: bodies with a length).
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memchr, memcmp, memcpy, memmove
from posix.unistd cimport close

from ._poll cimport *

cdef extern from "sys/socket.h" nogil:
    ssize_t recv(int fd, void* buffer, size_t size, int flags)

cdef extern from "ctype.h" nogil:
    int tolower(int octet)

cdef enum Phase:
    FREE
    COMMAND
    CONTENT
    CHUNK
    HEAD
    BODY

cdef enum Stage:
    CONNECT
    HELLO
    MAIL
    RCPT
    DATA
    ANSWER
    DROP
    STAGE_COUNT

cdef list STAGES = ["connect", "hello", "mail", "rcpt", "data", "content", "drop"]

cdef enum:
    LINE = 8192
    OUT = 4096
    READ = 262144
    BATCH = 512
    RULES = 8
    #: Octets of one content from which its pieces are acknowledged at once.
    LARGE = 131072

cdef int64_t SECOND = 1_000_000_000
#: Of one chunk or body; more digits mean nothing.
cdef int64_t MOST_OCTETS = 1_000_000_000_000

cdef struct Octets:
    const char* start
    size_t size

cdef struct Rule:
    uint64_t below  # of 2^64
    Octets reply

cdef struct Session:
    int fd
    int slot
    int phase
    int matched  # of CRLF.CRLF
    int recipients
    int64_t left  # of the chunk or body
    int64_t size  # of the content so far
    int64_t due
    uint32_t generation
    bint mail
    bint last
    bint closing
    bint stalled  # its answer is not due yet
    bint blocked  # it does not read what is answered
    bint muted  # nothing is read from it
    bint refuse_length
    char* kept
    size_t kept_size
    int line_size
    int out_size
    char out[OUT]
    char line[LINE]

cdef struct Wait:
    int slot
    uint32_t generation


cdef bint begins(const char* text, Py_ssize_t size, const char* word, Py_ssize_t length) noexcept nogil:
    """In any case; ``word`` in lower case."""
    cdef Py_ssize_t at
    if size < length:
        return False
    for at in range(length):
        if tolower(<unsigned char>text[at]) != word[at]:
            return False
    return True


cdef const char* END = b"\r\n.\r\n"


cdef inline int step(int matched, char octet) noexcept nogil:
    if octet == END[matched]:
        return matched + 1
    return 1 if octet == 13 else 0


cdef const char* end_of_data(int* matched, const char* octets, const char* end) noexcept nogil:
    """Behind CRLF.CRLF, or NULL. ``matched``: how much of it the octets before ended with; kept up to date."""
    cdef const char* near = octets + 4 if end - octets > 4 else end
    cdef const char* at = octets
    while at < near:
        matched[0] = step(matched[0], at[0])
        at += 1
        if matched[0] == 5:
            return at
    if at == end:
        return NULL
    at = octets + 2
    while end - at > 2:
        at = <const char*>memchr(at, 46, end - at - 2)
        if at == NULL:
            break
        if memcmp(at - 2, END, 5) == 0:
            return at + 3
        at += 1
    matched[0] = 0
    at = end - 4
    while at < end:
        matched[0] = step(matched[0], at[0])
        at += 1
    return NULL


@cython.final
cdef class Sink:
    cdef wire_poll poll
    cdef wire_event* events
    cdef char* buffer
    cdef Session* sessions
    cdef Wait* waits
    cdef int* listening
    cdef int* free_slots
    cdef int listener_count, most, used, free_count, wait_first, wait_count, wait_room
    cdef bint opened, http, lmtp, full
    cdef int64_t now, delay
    cdef uint64_t dice
    cdef Rule rules[STAGE_COUNT][RULES]
    cdef int rule_count[STAGE_COUNT]
    cdef int64_t failed[STAGE_COUNT]
    cdef list _kept
    cdef readonly int64_t taken, refused, dropped, recipients, octets, connections, most_open

    def __cinit__(self):
        self.events = NULL
        self.opened = False

    def __init__(self, listeners, str protocol="smtp", *, int connections=10000, double delay=0.0, fails=(), seed=1):
        cdef int number
        cdef Octets reply
        if self.events != NULL:
            raise RuntimeError("a sink is opened once")
        if protocol not in ("smtp", "lmtp", "http") or not listeners or connections < 1 or not delay >= 0:
            raise ValueError("smtp, lmtp or http, and a socket at least")
        self.http, self.lmtp, self.delay = protocol == "http", protocol == "lmtp", <int64_t>(delay * 1e9)
        self.most, self.listener_count = connections, len(listeners)
        # The sequence of dice is never 0.
        self.dice = (seed * 0x9E3779B97F4A7C15) % 2**64 | 1
        self._kept = []
        for stage, share, octets in fails:
            if stage not in STAGES or not 0 <= share <= 1 or (self.http and stage not in ("connect", "content", "drop")):
                raise ValueError(f"{stage!r} is no stage of {protocol}, or {share} no share")
            number = STAGES.index(stage)
            if self.rule_count[number] == RULES:
                raise ValueError(f"too many for {stage!r}")
            if len(octets) > 1000:
                raise ValueError(f"the reply for {stage!r} is too long")
            self._kept.append(octets)
            reply.start, reply.size = <bytes>octets, len(octets)
            before = self.rules[number][self.rule_count[number] - 1].below if self.rule_count[number] else 0
            self.rules[number][self.rule_count[number]].below = min(before + int(share * 2**64), 2**64 - 1)
            self.rules[number][self.rule_count[number]].reply = reply
            self.rule_count[number] += 1
        self.events = <wire_event*>malloc(BATCH * sizeof(wire_event))
        self.buffer = <char*>malloc(READ)
        self.sessions = <Session*>calloc(connections, sizeof(Session))
        self.free_slots = <int*>malloc(connections * sizeof(int))
        self.listening = <int*>malloc(self.listener_count * sizeof(int))
        # A connection that ended leaves its wait behind until that is due.
        self.wait_room = 4 * connections
        self.waits = <Wait*>malloc(self.wait_room * sizeof(Wait))
        if NULL in (self.events, self.buffer, self.sessions, self.free_slots, self.listening, self.waits):
            raise MemoryError
        if wire_open(&self.poll, connections + self.listener_count) < 0:
            raise OSError(wire_errno(), "no descriptor is left")
        self.opened = True
        for number in range(self.listener_count):
            self.listening[number] = listeners[number]
            if wire_watch(&self.poll, self.listening[number], connections + number, WIRE_READ) < 0:
                raise OSError(wire_errno(), "that socket cannot be waited for")

    def __dealloc__(self):
        cdef int slot
        if self.sessions != NULL:
            for slot in range(self.used):
                if self.sessions[slot].fd >= 0 and self.opened:
                    close(self.sessions[slot].fd)
                free(self.sessions[slot].kept)
        if self.opened:
            wire_shut(&self.poll)
        free(self.events)
        free(self.buffer)
        free(self.sessions)
        free(self.free_slots)
        free(self.listening)
        free(self.waits)

    def turn(self, double seconds, int64_t messages=0):
        cdef int64_t until = wire_now() + <int64_t>(seconds * 1e9)
        if not self.opened:
            return False
        with nogil:
            self._work(until, messages)
        return bool(messages and self._came() >= messages)

    def close(self):
        cdef int slot
        if not self.opened:
            return
        for slot in range(self.used):
            if self.sessions[slot].fd >= 0:
                close(self.sessions[slot].fd)
                self.sessions[slot].fd = -1
        wire_shut(&self.poll)
        self.opened = False

    @property
    def open(self):
        return self.used - self.free_count

    def stages(self):
        cdef int stage
        return {STAGES[stage]: self.failed[stage] for stage in range(<int>STAGE_COUNT) if self.failed[stage]}

    # ---------------------------------------------------------------------- the loop

    cdef int64_t _came(self) noexcept nogil:
        return self.taken + self.refused + self.dropped

    cdef void _work(self, int64_t until, int64_t messages) noexcept nogil:
        cdef int64_t wait
        cdef int count, number, slot
        cdef Session* session
        while not (messages and self._came() >= messages):
            self.now = wire_now()
            wait = max(until - self.now, 0)
            if self.wait_count:
                wait = min(wait, self._due())
            count = wire_wait(&self.poll, self.events, BATCH, wait)
            for number in range(count):
                slot = self.events[number].slot
                if slot >= self.most:
                    self._accept(self.listening[slot - self.most])
                    continue
                session = &self.sessions[slot]
                if session.fd < 0:
                    continue
                if self.events[number].events & WIRE_WRITE and session.blocked:  # an error is told as both, and found by reading
                    self._flush(session)
                elif session.stalled or session.blocked:
                    # Once is the next request, which waits; twice is the end of a connection nobody listens to.
                    if session.muted:
                        self._end(session)
                    else:
                        session.muted = True
                        self._watch(session)
                else:
                    self._read(session)
            # Looks at least once, however late it came to it.
            if self.now >= until:
                return

    cdef int64_t _due(self) noexcept nogil:
        """Answers what is due; nanoseconds to the next one."""
        cdef Wait* wait
        cdef Session* session
        while self.wait_count:
            wait = &self.waits[self.wait_first]
            session = &self.sessions[wait.slot]
            if session.fd >= 0 and session.generation == wait.generation and session.stalled:
                if session.due > self.now:
                    return session.due - self.now
                session.stalled = False
                self._answer(session)
                self._go_on(session)
            self.wait_first = (self.wait_first + 1) % self.wait_room
            self.wait_count -= 1
        return SECOND

    cdef void _accept(self, int listener) noexcept nogil:
        cdef int fd, number
        cdef Session* session
        for number in range(64):
            if not self.free_count and self.used < self.most:
                # Memory that no connection ever used is never touched.
                self.sessions[self.used].fd = -1
                self.sessions[self.used].slot = self.used
                self.free_slots[0] = self.used
                self.free_count = 1
                self.used += 1
            if not self.free_count:
                # Until one ends the others wait in the kernel.
                self._listen(False)
                return
            fd = wire_accept(listener)
            if fd < 0:
                return
            self.free_count -= 1
            session = &self.sessions[self.free_slots[self.free_count]]
            session.fd = fd
            session.phase = HEAD if self.http else COMMAND
            session.matched = session.recipients = session.line_size = session.out_size = 0
            session.mail = session.last = session.closing = session.stalled = session.blocked = session.muted = session.refuse_length = False
            session.left = session.size = 0
            self.connections += 1
            self.most_open = max(self.most_open, self.used - self.free_count)
            wire_prompt(fd)
            if wire_watch(&self.poll, fd, session.slot, WIRE_READ) < 0:
                self._end(session)
            elif self._fails(session, CONNECT):
                session.closing = True
                self._flush(session)
            elif not self.http:
                self._say(session, b"220 sink.example ESMTP\r\n", 24)
                self._flush(session)

    cdef void _listen(self, bint wanted) noexcept nogil:
        cdef int number
        if self.full == (not wanted):
            return
        self.full = not wanted
        for number in range(self.listener_count):
            wire_change(&self.poll, self.listening[number], self.most + number, WIRE_READ if wanted else 0)

    cdef void _end(self, Session* session) noexcept nogil:
        wire_forget(&self.poll, session.slot)
        close(session.fd)
        session.fd = -1
        session.generation += 1
        session.phase = FREE
        free(session.kept)
        session.kept = NULL
        session.kept_size = 0
        self.free_slots[self.free_count] = session.slot
        self.free_count += 1
        self._listen(True)

    cdef void _watch(self, Session* session) noexcept nogil:
        wire_change(&self.poll, session.fd, session.slot, (0 if session.muted else <int>WIRE_READ) | (<int>WIRE_WRITE if session.blocked else 0))

    # ------------------------------------------------------------------------- writing

    cdef void _say(self, Session* session, const char* octets, size_t size) noexcept nogil:
        """There is room for 1 KiB whenever a line or content begins; who takes none of more than that is left."""
        if session.out_size + size > OUT:
            self._send(session)
        if session.out_size + size > OUT:
            session.closing = True
            return
        memcpy(session.out + session.out_size, octets, size)
        session.out_size += <int>size

    cdef void _send(self, Session* session) noexcept nogil:
        """As much as the client takes."""
        cdef iovec part
        cdef ssize_t sent
        if not session.out_size:
            return
        part.iov_base, part.iov_len = session.out, session.out_size
        sent = wire_send(session.fd, &part, 1)
        if sent < 0:
            if not wire_would_block():
                session.out_size = 0
                session.closing = True
            return
        session.out_size -= <int>sent
        if session.out_size:
            memmove(session.out, session.out + sent, session.out_size)

    cdef void _flush(self, Session* session) noexcept nogil:
        """After a read, or when the client takes more."""
        self._send(session)
        if session.out_size == 0 and session.closing:
            self._end(session)
            return
        if session.blocked != (session.out_size > 0):
            session.blocked = session.out_size > 0
            if not session.blocked and not session.stalled:
                session.muted = True  # so that it is watched anew
                self._go_on(session)
            else:
                self._watch(session)

    cdef void _go_on(self, Session* session) noexcept nogil:
        """What was kept is read now."""
        cdef char* kept = session.kept
        cdef size_t size = session.kept_size
        session.kept = NULL
        session.kept_size = 0
        if session.muted:
            session.muted = False
            self._watch(session)
        if size:
            self._feed(session, kept, size)
            free(kept)
        if session.fd >= 0:
            self._flush(session)

    # ------------------------------------------------------------------------- reading

    cdef void _read(self, Session* session) noexcept nogil:
        cdef ssize_t size = recv(session.fd, self.buffer, READ, 0)
        if size <= 0:
            if size == 0 or not wire_would_block():
                self._end(session)
            return
        self._feed(session, self.buffer, size)
        if session.fd >= 0:
            if session.out_size or session.closing:
                self._flush(session)
            elif session.size > LARGE:
                wire_acknowledge(session.fd)

    cdef void _feed(self, Session* session, const char* octets, Py_ssize_t size) noexcept nogil:
        cdef const char* end = octets + size
        cdef const char* stop
        cdef Py_ssize_t length
        while octets < end and not session.closing:
            if not session.stalled and session.out_size > OUT - 1024:
                self._send(session)
                session.blocked = session.out_size > OUT - 1024
                if session.blocked:
                    self._watch(session)
            if session.stalled or session.blocked:
                session.kept = <char*>malloc(end - octets)
                if session.kept == NULL:
                    session.closing = True
                    return
                session.kept_size = end - octets
                memcpy(session.kept, octets, session.kept_size)
                return
            if session.phase == CONTENT:
                stop = end_of_data(&session.matched, octets, end)
                length = (stop if stop != NULL else end) - octets
                session.size += length
                octets += length
                if stop != NULL:
                    session.size = max(session.size - 3, 0)
                    self._over(session)
                continue
            if session.phase == CHUNK or session.phase == BODY:
                length = min(session.left, end - octets)
                session.left -= length
                session.size += length
                octets += length
                if session.left == 0:
                    self._chunk_over(session)
                continue
            stop = <const char*>memchr(octets, 10, end - octets)
            length = (stop if stop != NULL else end) - octets
            if session.line_size + length > LINE:
                session.closing = True
                return
            if stop == NULL or session.line_size:
                memcpy(session.line + session.line_size, octets, length)
                session.line_size += <int>length
                if stop == NULL:
                    return
                length = session.line_size
                session.line_size = 0
                self._line(session, session.line, length)
            else:
                self._line(session, octets, length)
            octets = stop + 1

    cdef void _line(self, Session* session, const char* text, Py_ssize_t size) noexcept nogil:
        if size and text[size - 1] == 13:
            size -= 1
        if self.http:
            self._field(session, text, size)
        else:
            self._command(session, text, size)

    # ---------------------------------------------------------------------------- SMTP

    cdef bint _fails(self, Session* session, int stage) noexcept nogil:
        """Throws the dice; where it is to fail, that is said."""
        cdef int number
        if not self.rule_count[stage]:
            return False
        self.dice ^= self.dice << 13
        self.dice ^= self.dice >> 7
        self.dice ^= self.dice << 17
        for number in range(self.rule_count[stage]):
            if self.dice <= self.rules[stage][number].below and self.rules[stage][number].below:
                self.failed[stage] += 1
                self._say(session, self.rules[stage][number].reply.start, self.rules[stage][number].reply.size)
                return True
        return False

    cdef void _command(self, Session* session, const char* text, Py_ssize_t size) noexcept nogil:
        if begins(text, size, b"mail from:", 10):
            if session.mail:
                self._say(session, b"503 5.5.1 one at a time\r\n", 25)
            elif not self._fails(session, MAIL):
                session.mail = True
                session.recipients = 0
                self._say(session, b"250 2.1.0 ok\r\n", 14)
        elif begins(text, size, b"rcpt to:", 8):
            if not session.mail:
                self._say(session, b"503 5.5.1 MAIL first\r\n", 22)
            elif not self._fails(session, RCPT):
                session.recipients += 1
                self._say(session, b"250 2.1.5 ok\r\n", 14)
        elif begins(text, size, b"data", 4) and size == 4:
            if not session.recipients:
                self._say(session, b"503 5.5.1 RCPT first\r\n", 22)
            elif not self._fails(session, DATA):
                session.phase = CONTENT
                session.matched, session.size = 2, 0
                self._say(session, b"354 go on\r\n", 11)
        elif begins(text, size, b"bdat ", 5):
            self._bdat(session, text + 5, size - 5)
        elif begins(text, size, b"ehlo", 4) or begins(text, size, b"lhlo", 4):
            self._forget(session)
            if not self._fails(session, HELLO):
                self._say(
                    session,
                    b"250-sink.example\r\n250-PIPELINING\r\n250-SIZE\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n250-ENHANCEDSTATUSCODES\r\n"
                    b"250-CHUNKING\r\n250-BINARYMIME\r\n250 DSN\r\n",
                    136,
                )
        elif begins(text, size, b"helo", 4):
            self._forget(session)
            if not self._fails(session, HELLO):
                self._say(session, b"250 sink.example\r\n", 18)
        elif begins(text, size, b"rset", 4):
            self._forget(session)
            self._say(session, b"250 2.0.0 ok\r\n", 14)
        elif begins(text, size, b"noop", 4):
            self._say(session, b"250 2.0.0 ok\r\n", 14)
        elif begins(text, size, b"quit", 4):
            self._say(session, b"221 2.0.0 bye\r\n", 15)
            session.closing = True
        else:
            self._say(session, b"500 5.5.2 unknown\r\n", 19)

    cdef void _forget(self, Session* session) noexcept nogil:
        session.mail = False
        session.recipients = 0
        session.size = 0

    cdef void _bdat(self, Session* session, const char* text, Py_ssize_t size) noexcept nogil:
        cdef Py_ssize_t at = 0
        cdef int64_t octets = 0
        while at < size and 48 <= text[at] <= 57 and octets < MOST_OCTETS:
            octets = octets * 10 + text[at] - 48
            at += 1
        session.last = begins(text + at, size - at, b" last", 5)
        if at == 0 or (at < size and not session.last):
            # What follows cannot be told from commands.
            self._say(session, b"501 5.5.4 BDAT what?\r\n", 22)
            session.closing = True
            return
        session.phase, session.left = CHUNK, octets
        if octets == 0:
            self._chunk_over(session)

    cdef void _chunk_over(self, Session* session) noexcept nogil:
        if self.http:
            self._over(session)
            return
        session.phase = COMMAND
        if not session.recipients:
            self._say(session, b"503 5.5.1 RCPT first\r\n", 22)
        elif session.last:
            self._over(session)
        else:
            self._say(session, b"250 2.0.0 ok\r\n", 14)

    cdef void _over(self, Session* session) noexcept nogil:
        """All of a message is here."""
        session.phase = HEAD if self.http else COMMAND
        self.octets += session.size
        if self.delay and self.wait_count < self.wait_room:
            session.stalled = True
            session.due = wire_now() + self.delay
            self.waits[(self.wait_first + self.wait_count) % self.wait_room].slot = session.slot
            self.waits[(self.wait_first + self.wait_count) % self.wait_room].generation = session.generation
            self.wait_count += 1
        else:
            self._answer(session)

    cdef void _answer(self, Session* session) noexcept nogil:
        cdef int number
        if self.rule_count[<int>DROP]:
            number = session.out_size
            if self._fails(session, DROP):
                session.out_size = number
                self.dropped += 1
                session.closing = True
                return
        if self._fails(session, ANSWER):
            self.refused += 1
            if self.lmtp:
                for number in range(1, session.recipients):
                    self._say(session, b"452 4.0.0 refused with the first\r\n", 34)
        else:
            self.taken += 1
            if self.http:
                self._say(session, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 38)
            else:
                self.recipients += session.recipients
                for number in range(session.recipients if self.lmtp else 1):
                    self._say(session, b"250 2.0.0 ok\r\n", 14)
        self._forget(session)
        if self.http and session.last:
            session.closing = True

    # ---------------------------------------------------------------------------- HTTP

    cdef void _field(self, Session* session, const char* text, Py_ssize_t size) noexcept nogil:
        """A line of the head of a request: the request line and fields that matter, the empty one at last."""
        cdef Py_ssize_t at
        if size == 0:
            if not session.mail:
                return
            session.mail = False
            if session.refuse_length:
                self._say(session, b"HTTP/1.1 411 Length Required\r\ncontent-length: 0\r\n\r\n", 51)
                session.closing = True
            elif session.left:
                session.phase = BODY
            else:
                self._over(session)
        elif not session.mail:
            # The request line; what ends with HTTP/1.0 is answered and closed.
            session.mail = True
            session.left = session.size = 0
            session.last = begins(text + size - 8, 8, b"http/1.0", 8) if size > 8 else True
        elif begins(text, size, b"content-length:", 15):
            at = 15
            while at < size and text[at] == 32:
                at += 1
            session.left = 0
            while at < size and 48 <= text[at] <= 57 and session.left < MOST_OCTETS:
                session.left = session.left * 10 + text[at] - 48
                at += 1
        elif begins(text, size, b"transfer-encoding:", 18):
            session.refuse_length = True
        elif begins(text, size, b"connection: close", 17):
            session.last = True
        elif begins(text, size, b"expect: 100-continue", 20):
            self._say(session, b"HTTP/1.1 100 Continue\r\n\r\n", 25)
