# cython: auto_pickle=False, autotestdict=False, cdivision=True, emit_code_comments=False
"""The load generator's engine: every session is a small dialogue that replies carry forward.

Its manual is ``_wire.pyi``. A session holds no text but the line it is reading: all that is said
stands ready in buffers that all sessions share, and a reply is three digits and whether it goes on.
One wait serves all sessions; each event is one read, and what follows from it one write.
TLS is the exception: its records are made by Python objects, and only there is the GIL taken.

RFC 5321 §3 and §4.2 (replies), RFC 2920 (what may be sent ahead), RFC 3030 (BDAT), RFC 2033 (LMTP).
"""

cimport cython
from libc.errno cimport ECONNREFUSED
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memchr, memcpy, memset, strerror
from posix.unistd cimport close

from ._poll cimport *

cdef extern from "sys/socket.h" nogil:
    ssize_t recv(int fd, void* buffer, size_t size, int flags)

cdef extern from "ctype.h" nogil:
    int tolower(int octet)

cdef extern from *:
    """
    #define wire_top_bit(value) (63 - __builtin_clzll(value))
    """
    int wire_top_bit(uint64_t value) noexcept nogil


# ------------------------------------------------------------------------ histogram

cdef enum:
    BITS = 7  # of a value that are told apart
    STEPS = 1 << BITS
    BUCKETS = (64 - BITS + 1) * STEPS


cdef inline int bucket_of(uint64_t value) noexcept nogil:
    cdef int shift
    if value < 2 * STEPS:
        return <int>value
    shift = wire_top_bit(value) - BITS
    return shift * STEPS + <int>(value >> shift)


cdef inline uint64_t highest_in(int bucket) noexcept nogil:
    cdef int shift
    if bucket < 2 * STEPS:
        return bucket
    shift = bucket // STEPS - 1
    return ((<uint64_t>(bucket - shift * STEPS) + 1) << shift) - 1


@cython.final
cdef class Histogram:
    cdef uint64_t counts[BUCKETS]
    cdef readonly uint64_t count
    cdef uint64_t least, most
    cdef readonly double total

    def __cinit__(self):
        self.wipe()

    cdef void wipe(self) noexcept nogil:
        memset(self.counts, 0, sizeof(self.counts))
        self.count = self.most = 0
        self.least = <uint64_t>-1
        self.total = 0

    cdef void put(self, uint64_t value, uint64_t times) noexcept nogil:
        self.counts[bucket_of(value)] += times
        self.count += times
        self.total += <double>value * <double>times
        if value < self.least:
            self.least = value
        if value > self.most:
            self.most = value

    def record(self, value, int64_t times=1):
        cdef int64_t number = max(value, 0)
        if times < 0:
            raise ValueError("a value is seen a number of times, not less than none")
        if times:
            self.put(number, times)

    @property
    def minimum(self):
        return self.least if self.count else 0

    @property
    def maximum(self):
        return self.most

    def at(self, double share):
        cdef uint64_t seen = 0, wanted
        cdef int bucket
        if not self.count:
            return 0
        if not share < 1:
            return self.most
        # The nearest rank: the smallest value that so many are not above.
        wanted = <uint64_t>(share * <double>self.count) if share > 0 else 0
        if <double>wanted < share * <double>self.count or wanted == 0:
            wanted += 1
        for bucket in range(BUCKETS):
            seen += self.counts[bucket]
            if seen >= wanted:
                return min(highest_in(bucket), self.most)
        return self.most

    def add(self, Histogram other not None):
        cdef int bucket
        cdef uint64_t count
        for bucket in range(BUCKETS):
            self.counts[bucket] += other.counts[bucket]
        count = other.count
        self.least = min(self.least, other.least)
        self.most = max(self.most, other.most)
        self.total += other.total
        self.count += count

    def clear(self):
        self.wipe()

    def buckets(self):
        return [(highest_in(bucket), self.counts[bucket]) for bucket in range(BUCKETS) if self.counts[bucket]]


# ------------------------------------------------------------------------ the engine

cdef enum Phase:
    OFF  # no connection, until `wake`
    CONNECTING
    SHAKING
    GREETING
    HELLO
    STARTTLS
    AUTH
    IDLE
    MAIL
    RCPT
    DATA
    CONTENT
    RSET
    QUIT
    GONE

cdef enum Kind:
    REFUSED  # the connection
    UNREACHED
    CLOSED
    RESET
    LATE
    NO_REPLY
    NO_TLS
    TOO_EARLY
    TURNED
    KINDS

cdef list KIND_NAMES = [
    "connection refused",
    "no connection",
    "closed by the server",
    "connection broken",
    "no reply in time",
    "not an SMTP reply",
    "TLS",
    "replies that nothing asked for",
    "turned away before the first mail",
]

#: What a reply answers.
cdef list STAGES = ["greeting", "hello", "starttls", "auth", "mail", "rcpt", "data", "content", "other"]

cdef enum:
    GREETED = 0
    STAGE_COUNT = 9
    CAN_PIPELINE = 1
    CAN_CHUNK = 2
    CAN_TLS = 4
    CAN_AUTH = 8
    CAN_EIGHT = 16
    LINE = 2048  # of a reply; RFC 5321 §4.5.3.1.5 says 512, and some say more
    READ = 65536
    PARTS = 8
    BATCH = 1024
    TRIES = 10  # connections in a row without one reply to a mail, then a session gives up
    SAMPLES = 64
    TEXT = 200

cdef int64_t SECOND = 1_000_000_000
cdef int64_t FIRST_PAUSE = 10_000_000


cdef struct Octets:
    const char* start
    size_t size

cdef struct Mail:
    # What begins it, and the same where the server offers 8BITMIME: MAIL, or all that may go in one write.
    Octets group[2]
    Octets body
    int64_t size

cdef struct Sample:
    int stage
    int code
    int size
    char text[TEXT]

cdef struct Session:
    int fd
    int slot
    int phase
    int offered
    int generation  # of the connection
    int tries
    int mail
    int ahead_mail
    int rcpt  # the next recipient that is answered, or said
    int taken
    int owed  # replies to the content
    int verdict  # the code that refused the message, 0
    int64_t sent
    int64_t begun_at
    int64_t ahead_at
    int64_t opened_at
    int64_t since
    int64_t wake
    int64_t troubled  # since its last good connection broke
    bint ahead
    bint waiting  # stands in the row of idle sessions
    bint secured
    bint settled  # its first connection is ready, or failed
    bint wants_write
    int parts
    int line_size
    iovec out[PARTS]
    char line[LINE]


cdef bint same(const char* text, Py_ssize_t size, const char* word, Py_ssize_t length) noexcept nogil:
    """Begins with this keyword (in lower case), as a whole word?"""
    cdef Py_ssize_t at
    if size < length or (size > length and text[length] != 32 and text[length] != 61):
        return False
    for at in range(length):
        if tolower(<unsigned char>text[at]) != word[at]:
            return False
    return True


@cython.final
cdef class Generator:
    cdef wire_poll poll
    cdef wire_address address
    cdef wire_event* events
    cdef char* buffer
    cdef Session* sessions
    cdef int* row  # idle sessions, the longest idle first
    cdef Mail* mails
    cdef Octets* rcpts
    cdef Octets hello, auth
    cdef Sample samples[SAMPLES]
    cdef int session_count, row_first, row_size, mail_count, rcpt_count, sample_count, alive, off, last_errno, starting
    cdef bint opened, pipeline, bdat, lmtp, tls, implicit, stopping, told_idle
    cdef int64_t limit, per_connection, started, ended, ends, run_for, sweep_at, now, timeout, origin
    cdef double interval
    cdef uint64_t codes[STAGE_COUNT][1000]
    cdef uint64_t kinds[KINDS]
    cdef readonly int64_t begun, accepted, refused, broken, connections, octets
    cdef readonly Histogram latency, setup
    cdef readonly str failure
    cdef str _tls_fault
    cdef object _secure
    cdef list _kept, _secured, _cipher

    def __cinit__(self):
        self.events = NULL
        self.opened = False

    def __init__(
        self, str host, int port, *, unsigned int scope=0, int sessions, mails, sizes, recipients, bytes hello, bytes auth=b"",
        int64_t messages=0, double seconds=0.0, double rate=0.0, int64_t per_connection=0, bint pipeline=False, bint bdat=False,
        bint lmtp=False, secure=None, bint implicit=False, double timeout=60.0,
    ):
        cdef int slot
        if self.events != NULL:
            raise RuntimeError("a generator runs once")
        if sessions < 1 or not mails or not recipients or len(sizes) != len(mails):
            raise ValueError("a session, a mail with its size and a recipient at least")
        name = host.encode("utf-8", "surrogateescape")
        if b"\0" in name or wire_resolve(&self.address, name, port, scope) < 0:
            raise ValueError(f"{host!r} is no numeric address and no path of a socket")
        self.session_count, self.mail_count, self.rcpt_count = sessions, len(mails), len(recipients)
        self.events = <wire_event*>malloc(BATCH * sizeof(wire_event))
        self.buffer = <char*>malloc(READ)
        self.sessions = <Session*>calloc(sessions, sizeof(Session))
        self.row = <int*>malloc(sessions * sizeof(int))
        self.mails = <Mail*>calloc(self.mail_count, sizeof(Mail))
        self.rcpts = <Octets*>calloc(self.rcpt_count, sizeof(Octets))
        if NULL in (self.events, self.buffer, self.sessions, self.row, self.mails, self.rcpts):
            raise MemoryError
        if wire_open(&self.poll, sessions + 1) < 0:
            raise OSError(wire_errno(), "no descriptor is left")
        self.opened = True
        for slot in range(sessions):
            self.sessions[slot].fd = -1
            self.sessions[slot].slot = slot
            self.sessions[slot].phase = OFF
        self.alive = self.off = self.starting = sessions
        self.pipeline, self.bdat, self.lmtp, self.tls, self.implicit = pipeline, bdat, lmtp, secure is not None, implicit
        self.limit, self.per_connection = messages, per_connection
        self.run_for, self.timeout = <int64_t>(seconds * 1e9), <int64_t>(timeout * 1e9)
        self.interval = 1e9 / rate if rate > 0 else 0
        self.latency, self.setup = Histogram(), Histogram()
        self.failure, self._tls_fault = "", ""
        self._secure, self._kept = secure, []
        self._secured, self._cipher = [None] * sessions, [b""] * sessions
        self.hello, self.auth = self._keep(hello), self._keep(auth)
        everybody = b"".join(recipients)
        for number, line in enumerate(recipients):
            self.rcpts[number] = self._keep(line)
        for number, (plain, eight, body) in enumerate(mails):
            ending = body if bdat else b"DATA\r\n"
            for form, line in enumerate((plain, eight)):
                if form and eight == plain:
                    self.mails[number].group[form] = self.mails[number].group[0]
                else:
                    self.mails[number].group[form] = self._keep(line + everybody + ending if pipeline else line)
            self.mails[number].body = self._keep(body)
            self.mails[number].size = sizes[number]

    cdef Octets _keep(self, bytes octets):
        cdef Octets kept
        self._kept.append(octets)
        kept.start, kept.size = octets, len(octets)
        return kept

    def __dealloc__(self):
        cdef int slot
        if self.sessions != NULL:
            for slot in range(self.session_count):
                if self.sessions[slot].fd >= 0 and self.opened:
                    close(self.sessions[slot].fd)
        if self.opened:
            wire_shut(&self.poll)
        free(self.events)
        free(self.buffer)
        free(self.sessions)
        free(self.row)
        free(self.mails)
        free(self.rcpts)

    # ------------------------------------------------------------------ from outside

    def turn(self, double seconds):
        cdef int64_t until = wire_now() + <int64_t>(seconds * 1e9)
        cdef long slack = 0
        if not self.opened:
            return False
        with nogil:
            slack = wire_sharpen(1)
            self._work(until)
            wire_sharpen(slack)
        if self.alive == 0:
            self.close()
        return self.opened

    def stop(self):
        self.now = wire_now()
        self._halt()

    def close(self):
        cdef int slot
        if not self.opened:
            return
        for slot in range(self.session_count):
            if self.sessions[slot].fd >= 0:
                close(self.sessions[slot].fd)
                self.sessions[slot].fd = -1
        wire_shut(&self.poll)
        self.opened = False

    @property
    def elapsed(self):
        return max(self.ended - self.started, 0) / 1e9 if self.started else 0.0

    @property
    def unsent(self):
        cdef int64_t until
        if not self.interval or not self.origin:
            return 0
        until = min(wire_now(), self.ends) if self.ends else wire_now()
        due = int((until - self.origin) / self.interval)
        return max((min(due, self.limit) if self.limit else due) - self.begun, 0)

    def replies(self):
        cdef int stage, code
        found = {}
        for stage in range(STAGE_COUNT):
            codes = {code: self.codes[stage][code] for code in range(1000) if self.codes[stage][code]}
            if codes:
                found[STAGES[stage]] = codes
        return found

    def texts(self):
        return {
            (STAGES[self.samples[number].stage], self.samples[number].code): self.samples[number].text[: self.samples[number].size].decode("utf-8", "replace")
            for number in range(self.sample_count)
        }

    def errors(self):
        cdef int kind
        found = {}
        for kind in range(<int>KINDS):
            if self.kinds[kind]:
                name = KIND_NAMES[kind]
                if kind == UNREACHED and self.last_errno:
                    name += f" ({(<bytes>strerror(self.last_errno)).decode()})"
                elif kind == NO_TLS and self._tls_fault:
                    name += f": {self._tls_fault}"
                found[name] = self.kinds[kind]
        return found

    # ---------------------------------------------------------------------- the loop

    cdef void _work(self, int64_t until) noexcept nogil:
        cdef int64_t wait
        cdef int count, number
        cdef Session* session
        while self.alive:
            self.now = wire_now()
            if self.now >= until:
                return
            if self.ends and self.now >= self.ends and not self.stopping:
                self._halt()
            if self.interval:
                self._dispatch()
            if self.now >= self.sweep_at:
                self._sweep()
            wait = min(until, self.sweep_at) - self.now
            if self.ends and not self.stopping:
                wait = min(wait, self.ends - self.now)
            if self.interval and self.origin and self.row_size and not self.stopping:
                wait = min(wait, self._due(self.begun) - self.now)
            count = wire_wait(&self.poll, self.events, BATCH, max(wait, 0))
            if count > 0:
                self.now = wire_now()
            for number in range(count):
                session = &self.sessions[self.events[number].slot]
                if session.fd >= 0:
                    self._happened(session, self.events[number].events)

    cdef int64_t _due(self, int64_t number) noexcept nogil:
        return self.origin + <int64_t>(<double>number * self.interval)

    cdef bint _over(self) noexcept nogil:
        """Nothing will be begun any more."""
        return self.stopping or (self.limit and self.begun >= self.limit)

    cdef void _halt(self) noexcept nogil:
        self.stopping = True
        self._dismiss()

    cdef void _dismiss(self) noexcept nogil:
        """Whoever is idle says QUIT, whoever waits for a connection stops waiting."""
        cdef int slot
        cdef Session* session
        for slot in range(self.session_count):
            session = &self.sessions[slot]
            if session.phase == IDLE:
                self._quit(session)
            elif session.phase == OFF:
                self.off -= 1
                self._gone(session)

    cdef void _start_clock(self) noexcept nogil:
        if not self.origin:
            self.origin = self.now
            if self.run_for:
                self.ends = self.now + self.run_for

    cdef void _dispatch(self) noexcept nogil:
        """With a rate: everything that is due and finds an idle session begins."""
        cdef Session* session
        cdef int64_t at
        # The clock starts when every session had its chance to connect.
        if not self.origin:
            if self.starting:
                return
            self._start_clock()
        if self._over() and not self.told_idle:
            self.told_idle = True
            self._dismiss()
            return
        while self.row_size:
            session = &self.sessions[self.row[self.row_first]]
            if session.phase == IDLE:
                at = self._take()
                if at < 0:
                    return
            self.row_first = (self.row_first + 1) % self.session_count
            self.row_size -= 1
            session.waiting = False
            if session.phase == IDLE:
                self._begin(session, at)

    cdef int64_t _take(self) noexcept nogil:
        """When the next message should begin, which is now counted as begun; -1 if it is not due or there is none."""
        cdef int64_t at = self.now
        if self._over():
            return -1
        if self.interval:
            at = self._due(self.begun)
            if at > self.now:
                return -1
        self.begun += 1
        return at

    cdef void _sweep(self) noexcept nogil:
        """Time-outs, and connections whose pause is over."""
        cdef int slot
        cdef Session* session
        self.sweep_at = self.now + min(SECOND, self.timeout // 4)
        for slot in range(self.session_count):
            session = &self.sessions[slot]
            if session.phase == OFF:
                if session.wake <= self.now:
                    self._connect(session)
                if session.phase == OFF:
                    self.sweep_at = min(self.sweep_at, max(session.wake, self.now + 1_000_000))
            elif session.fd >= 0 and session.phase != IDLE and self.now - session.since > self.timeout:
                self._lost(session, LATE)

    cdef void _happened(self, Session* session, int events) noexcept nogil:
        cdef int error, generation = session.generation
        if session.phase == CONNECTING:
            error = wire_error(session.fd)
            if error:
                self.last_errno = error
                self._lost(session, REFUSED if error == ECONNREFUSED else UNREACHED)
                return
            self._connected(session)
            return
        if events & WIRE_WRITE:
            self._flush(session)
        if events & WIRE_READ and session.generation == generation:
            self._read(session)

    # --------------------------------------------------------------------- connections

    cdef void _connect(self, Session* session) noexcept nogil:
        cdef int done = 0
        if session.phase == OFF:
            self.off -= 1
        session.offered = session.parts = session.line_size = 0
        session.sent = 0
        session.secured = session.ahead = session.wants_write = False
        session.opened_at = session.since = self.now
        session.fd = wire_connect(&self.address, &done)
        session.phase = CONNECTING
        if session.fd < 0 or wire_watch(&self.poll, session.fd, session.slot, WIRE_READ if done else WIRE_WRITE) < 0:
            self.last_errno = wire_errno()
            self._lost(session, REFUSED if self.last_errno == ECONNREFUSED else UNREACHED)
        elif done:
            self._connected(session)
        else:
            session.wants_write = True

    cdef void _connected(self, Session* session) noexcept nogil:
        self.connections += 1
        if session.wants_write:
            session.wants_write = False
            wire_change(&self.poll, session.fd, session.slot, WIRE_READ)
        session.phase = GREETING
        if self.tls and self.implicit:
            self._shake(session)

    cdef void _settled(self, Session* session) noexcept nogil:
        if not session.settled:
            session.settled = True
            self.starting -= 1

    cdef void _lost(self, Session* session, int kind) noexcept nogil:
        self.kinds[kind] += 1
        self._dropped(session)
        if session.tries == 0:
            session.troubled = self.now
        # A silent server has taken its time-out already.
        session.tries += TRIES // 2 if kind == LATE else 1
        if self._over() or session.tries >= TRIES or self.now - session.troubled >= self.timeout:
            self._gone(session)
            return
        session.phase = OFF
        self.off += 1
        session.wake = self.now + min(FIRST_PAUSE << (session.tries - 1), SECOND) if session.tries > 1 or kind <= UNREACHED else self.now
        self.sweep_at = min(self.sweep_at, session.wake)

    cdef void _dropped(self, Session* session) noexcept nogil:
        """Its connection is no more; what it had under way is broken off."""
        self._settled(session)
        if session.fd >= 0:
            wire_forget(&self.poll, session.slot)
            close(session.fd)
            session.fd = -1
        session.generation += 1
        if MAIL <= session.phase <= CONTENT:
            self.broken += 1 + session.ahead
            self.ended = self.now
        session.ahead = False
        if session.secured:
            self._unsecure(session)

    cdef void _gone(self, Session* session) noexcept nogil:
        session.phase = GONE
        self.alive -= 1

    cdef void _quit(self, Session* session) noexcept nogil:
        session.phase = QUIT
        self._say(session, b"QUIT\r\n", 6)

    cdef void _ended(self, Session* session) noexcept nogil:
        """After QUIT."""
        self._dropped(session)
        if self._over():
            self._gone(session)
        else:
            session.phase = CONNECTING
            self._connect(session)

    # ------------------------------------------------------------------------- writing

    cdef void _say(self, Session* session, const char* octets, size_t size) noexcept nogil:
        self._say_two(session, octets, size, NULL, 0)

    cdef void _say_two(self, Session* session, const char* first, size_t first_size, const char* second, size_t second_size) noexcept nogil:
        """One write for both."""
        session.since = self.now
        if session.secured:
            self._say_secret(session, first, first_size, second, second_size)
            return
        if session.parts + 2 > PARTS:
            self._lost(session, TOO_EARLY)
            return
        session.out[session.parts].iov_base = <void*>first
        session.out[session.parts].iov_len = first_size
        session.parts += 1
        if second_size:
            session.out[session.parts].iov_base = <void*>second
            session.out[session.parts].iov_len = second_size
            session.parts += 1
        if not session.wants_write:
            self._flush(session)

    cdef void _flush(self, Session* session) noexcept nogil:
        cdef ssize_t sent
        cdef int done, place
        while session.parts:
            sent = wire_send(session.fd, session.out, session.parts)
            if sent < 0:
                if wire_would_block():
                    break
                # What the server said before it closed is worth more than that it closed: the read tells.
                session.parts = 0
                return
            session.since = self.now
            done = 0
            while done < session.parts and <size_t>sent >= session.out[done].iov_len:
                sent -= session.out[done].iov_len
                done += 1
            if done < session.parts:
                session.out[done].iov_base = <char*>session.out[done].iov_base + sent
                session.out[done].iov_len -= sent
            if done:
                session.parts -= done
                for place in range(session.parts):
                    session.out[place] = session.out[place + done]
        if (session.parts != 0) != session.wants_write:
            session.wants_write = not session.wants_write
            wire_change(&self.poll, session.fd, session.slot, WIRE_READ | WIRE_WRITE if session.wants_write else WIRE_READ)
        if session.parts == 0 and session.secured:
            self._say_rest(session)

    # ------------------------------------------------------------------------- reading

    cdef void _read(self, Session* session) noexcept nogil:
        cdef ssize_t size = recv(session.fd, self.buffer, READ, 0)
        if size < 0:
            if not wire_would_block():
                self._closed(session, RESET)
        elif size == 0:
            self._closed(session, CLOSED)
        elif session.secured:
            self._read_secret(session, size)
        else:
            self._feed(session, self.buffer, size)

    cdef void _closed(self, Session* session, int kind) noexcept nogil:
        if session.phase == QUIT:
            self._ended(session)
        else:
            self._lost(session, kind)

    cdef void _feed(self, Session* session, const char* octets, Py_ssize_t size) noexcept nogil:
        """Replies, cut anywhere."""
        cdef int generation = session.generation
        cdef const char* end = octets + size
        cdef const char* stop
        cdef Py_ssize_t length
        while octets < end and session.generation == generation:
            stop = <const char*>memchr(octets, 10, end - octets)
            length = (stop if stop != NULL else end) - octets
            if session.line_size + length > LINE:
                self._lost(session, NO_REPLY)
                return
            if stop != NULL and session.line_size == 0:
                self._line(session, octets, length, stop + 1 < end)
            else:
                memcpy(session.line + session.line_size, octets, length)
                session.line_size += <int>length
                if stop == NULL:
                    return
                length = session.line_size
                session.line_size = 0
                self._line(session, session.line, length, stop + 1 < end)
            octets = stop + 1

    cdef void _line(self, Session* session, const char* text, Py_ssize_t size, bint more) noexcept nogil:
        """One line of a reply, without its LF. ``more``: octets came behind it."""
        cdef int code
        if size and text[size - 1] == 13:
            size -= 1
        if size < 3 or not (49 < text[0] < 54 and 47 < text[1] < 58 and 47 < text[2] < 58) or (size > 3 and text[3] != 32 and text[3] != 45):
            self._lost(session, NO_REPLY)
            return
        code = (text[0] - 48) * 100 + (text[1] - 48) * 10 + text[2] - 48
        if session.phase == HELLO and size > 4:
            self._offered(session, text + 4, size - 4)
        if size > 3 and text[3] == 45:
            return
        if session.phase == STARTTLS and more and code < 300:
            with gil:
                self._tls_fault = self._tls_fault or "the server said more in clear after it agreed to TLS"
            self._lost(session, NO_TLS)
            return
        self._replied(session, code, text + 4, size - 4)

    cdef void _offered(self, Session* session, const char* text, Py_ssize_t size) noexcept nogil:
        if same(text, size, b"pipelining", 10):
            session.offered |= CAN_PIPELINE
        elif same(text, size, b"chunking", 8):
            session.offered |= CAN_CHUNK
        elif same(text, size, b"starttls", 8):
            session.offered |= CAN_TLS
        elif same(text, size, b"auth", 4):
            session.offered |= CAN_AUTH
        elif same(text, size, b"8bitmime", 8):
            session.offered |= CAN_EIGHT

    # ---------------------------------------------------------------------- the dialogue

    cdef void _note(self, int stage, int code, const char* text, Py_ssize_t size) noexcept nogil:
        cdef Sample* sample
        self.codes[stage][code] += 1
        if code >= 400 and self.codes[stage][code] == 1 and self.sample_count < SAMPLES:
            sample = &self.samples[self.sample_count]
            self.sample_count += 1
            sample.stage, sample.code = stage, code
            sample.size = <int>min(max(size, 0), TEXT)
            memcpy(sample.text, text, sample.size)

    cdef void _replied(self, Session* session, int code, const char* text, Py_ssize_t size) noexcept nogil:
        cdef int phase = session.phase
        session.since = self.now
        if phase == CONTENT:
            self._note(7, code, text, size)
            self._answered(session, code)
        elif phase == MAIL:
            self._note(4, code, text, size)
            session.verdict = 0 if code < 300 else code
            session.rcpt = session.taken = 0
            session.phase = RCPT
            if not self.pipeline:
                if session.verdict:
                    self._finished(session)
                else:
                    self._say(session, self.rcpts[0].start, self.rcpts[0].size)
        elif phase == RCPT:
            self._note(5, code, text, size)
            session.rcpt += 1
            if code < 300:
                session.taken += 1
            elif not session.verdict:
                session.verdict = code
            if session.rcpt < self.rcpt_count:
                if not self.pipeline:
                    self._say(session, self.rcpts[session.rcpt].start, self.rcpts[session.rcpt].size)
            elif self.pipeline:
                session.phase = CONTENT if self.bdat else DATA
                session.owed = max(session.taken, 1) if self.lmtp else 1
            elif not session.taken:
                self._reset(session)
            elif self.bdat:
                self._content(session)
            else:
                session.phase = DATA
                self._say(session, b"DATA\r\n", 6)
        elif phase == DATA:
            self._note(6, code, text, size)
            if code == 354:
                self._content(session)
            else:
                if not session.verdict:
                    session.verdict = code
                self._reset(session)
        elif phase == RSET or phase == IDLE:
            self._note(8, code, text, size)
            if phase == RSET:
                self._free(session)
        elif phase == QUIT:
            self._ended(session)
        else:
            self._prepared(session, code, text, size)

    cdef void _prepared(self, Session* session, int code, const char* text, Py_ssize_t size) noexcept nogil:
        """Before the first mail of a connection."""
        if session.phase == GREETING:
            self._note(0, code, text, size)
            if code != 220:
                # It may close, or wait for QUIT; either way this one is no use.
                self._lost(session, TURNED)
                return
            session.phase = HELLO
            self._say(session, self.hello.start, self.hello.size)
        elif session.phase == HELLO:
            self._note(1, code, text, size)
            if code >= 300:
                self._fail(b"the server refuses EHLO", code)
            elif self.tls and not session.secured:
                if not session.offered & CAN_TLS:
                    self._fail(b"the server does not offer STARTTLS", 0)
                    return
                session.phase = STARTTLS
                self._say(session, b"STARTTLS\r\n", 10)
            elif self.pipeline and not session.offered & CAN_PIPELINE:
                self._fail(b"the server does not offer PIPELINING", 0)
            elif self.bdat and not session.offered & CAN_CHUNK:
                self._fail(b"the server does not offer CHUNKING, which BDAT wants", 0)
            elif self.auth.size:
                if not session.offered & CAN_AUTH:
                    self._fail(b"the server does not offer AUTH", 0)
                    return
                session.phase = AUTH
                self._say(session, self.auth.start, self.auth.size)
            else:
                self._ready(session)
        elif session.phase == STARTTLS:
            self._note(2, code, text, size)
            if code != 220:
                self._fail(b"the server refuses STARTTLS", code)
                return
            session.offered = 0
            self._shake(session)
        elif session.phase == AUTH:
            self._note(3, code, text, size)
            if code == 235:
                self._ready(session)
            elif code // 100 == 4:
                self._lost(session, TURNED)
            else:
                self._fail(b"the server refuses AUTH PLAIN", code)
        else:
            self._lost(session, NO_REPLY)

    cdef void _fail(self, const char* why, int code) noexcept with gil:
        """For every session: the run ends."""
        cdef int slot
        if not self.failure:
            self.failure = why.decode() + (f" ({code})" if code else "")
        self.stopping = True
        for slot in range(self.session_count):
            if self.sessions[slot].phase == GONE:
                continue
            if self.sessions[slot].phase == OFF:
                self.off -= 1
            self._dropped(&self.sessions[slot])
            self._gone(&self.sessions[slot])

    cdef void _ready(self, Session* session) noexcept nogil:
        self.setup.put(self.now - session.opened_at, 1)
        self._settled(session)
        self._free(session)

    cdef void _free(self, Session* session) noexcept nogil:
        """It can take a message."""
        cdef int64_t at
        if self._over() or (self.per_connection and session.sent >= self.per_connection):
            self._quit(session)
            return
        if self.interval:
            at = self._take() if self.origin else -1
        else:
            self._start_clock()
            at = self._take()
        if at >= 0:
            self._begin(session, at)
            return
        session.phase = IDLE
        if not session.waiting:
            session.waiting = True
            self.row[(self.row_first + self.row_size) % self.session_count] = session.slot
            self.row_size += 1

    cdef void _begin(self, Session* session, int64_t at) noexcept nogil:
        cdef Octets* said
        if not self.started:
            self.started = self.now
        session.mail = <int>((self.begun - 1) % self.mail_count)
        session.begun_at = at
        session.phase = MAIL
        said = &self.mails[session.mail].group[1 if session.offered & CAN_EIGHT else 0]
        self._say(session, said.start, said.size)

    cdef void _content(self, Session* session) noexcept nogil:
        cdef Octets* body = &self.mails[session.mail].body
        cdef Octets* said
        cdef int64_t at
        session.phase = CONTENT
        session.owed = max(session.taken, 1) if self.lmtp else 1
        if not session.taken:
            # Only where all was said ahead and DATA was agreed to all the same (RFC 2920 §3.1).
            self._say(session, b".\r\n", 3)
            return
        if self.pipeline and not (self.per_connection and session.sent + 1 >= self.per_connection):
            at = self._take()
            if at >= 0:
                session.ahead = True
                session.ahead_at = at
                session.ahead_mail = <int>((self.begun - 1) % self.mail_count)
                said = &self.mails[session.ahead_mail].group[1 if session.offered & CAN_EIGHT else 0]
                self._say_two(session, body.start, body.size, said.start, said.size)
                return
        self._say(session, body.start, body.size)

    cdef void _answered(self, Session* session, int code) noexcept nogil:
        """A reply after the data; in LMTP there is one for each recipient that was taken."""
        if code >= 300 and not session.verdict:
            session.verdict = code
        session.owed -= 1
        if session.owed > 0 and session.taken and code != 421:
            return
        self.latency.put(max(self.now - session.begun_at, 0), 1)
        if self.bdat and code >= 300 and not session.ahead:
            self._reset(session)
        else:
            self._finished(session)

    cdef void _reset(self, Session* session) noexcept nogil:
        """Refused before its end: the server forgets it, before the next one."""
        self._count(session)
        session.phase = RSET
        self._say(session, b"RSET\r\n", 6)

    cdef void _count(self, Session* session) noexcept nogil:
        self.ended = self.now
        session.sent += 1
        session.tries = 0
        if session.verdict:
            self.refused += 1
        else:
            self.accepted += 1
            self.octets += self.mails[session.mail].size

    cdef void _finished(self, Session* session) noexcept nogil:
        self._count(session)
        if session.ahead:
            session.ahead = False
            session.mail, session.begun_at = session.ahead_mail, session.ahead_at
            session.phase = MAIL
        else:
            self._free(session)

    # ------------------------------------------------------------------------------ TLS

    cdef void _shake(self, Session* session) noexcept with gil:
        session.secured = True
        session.phase = SHAKING
        try:
            self._secured[session.slot] = self._secure()
            self._cipher[session.slot] = b""
            self._secured[session.slot].feed(b"")
            self._push(session)
        except Exception as error:
            self._insecure(session, error)

    cdef void _insecure(self, Session* session, error) noexcept:
        self._tls_fault = self._tls_fault or str(error)
        self._lost(session, NO_TLS)

    cdef void _unsecure(self, Session* session) noexcept with gil:
        session.secured = False
        self._secured[session.slot] = None
        self._cipher[session.slot] = b""

    cdef _push(self, Session* session):
        """What TLS has to say goes out, or waits behind what is going out."""
        cdef bytes octets
        if session.parts:
            return
        octets = self._secured[session.slot].take()
        if octets:
            self._cipher[session.slot] = octets
            session.out[0].iov_base = <void*><char*>octets
            session.out[0].iov_len = len(octets)
            session.parts = 1
            self._flush(session)

    cdef void _say_rest(self, Session* session) noexcept with gil:
        try:
            self._push(session)
        except Exception as error:
            self._insecure(session, error)

    cdef void _say_secret(self, Session* session, const char* first, size_t first_size, const char* second, size_t second_size) noexcept with gil:
        try:
            self._secured[session.slot].write(first[:first_size] + (second[:second_size] if second_size else b""))
            self._push(session)
        except Exception as error:
            self._insecure(session, error)

    cdef void _read_secret(self, Session* session, ssize_t size) noexcept with gil:
        cdef bytes plain
        cdef bint shaking = session.phase == SHAKING
        try:
            secured = self._secured[session.slot]
            plain = secured.feed(self.buffer[:size])
            self._push(session)
            if shaking and secured.shaken:
                if self.implicit:
                    session.phase = GREETING
                else:
                    session.phase = HELLO
                    self._say(session, self.hello.start, self.hello.size)
        except Exception as error:
            self._insecure(session, error)
            return
        if plain and session.secured:
            self._feed(session, plain, len(plain))
