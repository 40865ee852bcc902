# cython: language_level=3
"""What the load generator and the counting receivers ask of the system, as C: sockets that
never block, one wait for all of them, a clock. epoll on Linux, poll elsewhere (and under
GATEWAY_PORTABLE, so that the other half is tested here too)."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <arpa/inet.h>
    #include <errno.h>
    #include <fcntl.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <poll.h>
    #include <stddef.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    #include <sys/un.h>
    #include <time.h>
    #include <unistd.h>
    #if defined(__linux__)
    #include <sys/prctl.h>
    #if !defined(GATEWAY_PORTABLE)
    #define WIRE_EPOLL
    #include <sys/epoll.h>
    #include <sys/syscall.h>
    #endif
    #endif
    #ifndef MSG_NOSIGNAL
    #define MSG_NOSIGNAL 0
    #endif

    enum { WIRE_READ = 1, WIRE_WRITE = 2 };

    typedef struct { uint32_t slot; int events; } wire_event;

    static inline int64_t wire_now(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    }

    /* Where somebody listens: a numeric IPv4 or IPv6 address, or (port < 0) the path of a unix socket. */
    typedef struct { struct sockaddr_storage name; socklen_t size; } wire_address;

    static inline int wire_resolve(wire_address *to, const char *host, int port, unsigned int scope)
    {
        memset(to, 0, sizeof *to);
        if (port < 0) {
            struct sockaddr_un *un = (struct sockaddr_un *)&to->name;
            const size_t length = strlen(host);
            if (length >= sizeof un->sun_path) return -1;
            un->sun_family = AF_UNIX;
            memcpy(un->sun_path, host, length + 1);
            to->size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + 1);
            return 0;
        }
        if (strchr(host, ':')) {
            struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&to->name;
            in6->sin6_family = AF_INET6;
            in6->sin6_port = htons((uint16_t)port);
            in6->sin6_scope_id = scope;
            to->size = sizeof *in6;
            return inet_pton(AF_INET6, host, &in6->sin6_addr) == 1 ? 0 : -1;
        }
        struct sockaddr_in *in = (struct sockaddr_in *)&to->name;
        in->sin_family = AF_INET;
        in->sin_port = htons((uint16_t)port);
        to->size = sizeof *in;
        return inet_pton(AF_INET, host, &in->sin_addr) == 1 ? 0 : -1;
    }

    static inline int wire_tune(int fd, int tcp)
    {
        const int one = 1;
        const int flags = fcntl(fd, F_GETFL);
        if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) return -1;
        if (tcp) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    #ifdef SO_NOSIGPIPE
        setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &one, sizeof one);
    #endif
        return 0;
    }

    /* A socket on its way there (*done: there already), or -1 with errno. */
    static inline int wire_connect(const wire_address *to, int *done)
    {
        const int family = to->name.ss_family;
        const int fd = socket(family, SOCK_STREAM, 0);
        if (fd < 0) return -1;
        *done = 0;
        if (wire_tune(fd, family != AF_UNIX) == 0) {
            if (connect(fd, (const struct sockaddr *)&to->name, to->size) == 0) { *done = 1; return fd; }
            if (errno == EINPROGRESS || errno == EINTR) return fd;
        }
        const int error = errno;
        close(fd);
        errno = error;
        return -1;
    }

    static inline int wire_accept(int listener)
    {
    #if defined(__linux__)
        const int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    #else
        const int fd = accept(listener, NULL, NULL);
        if (fd >= 0) wire_tune(fd, 0);
    #endif
        return fd;
    }

    /* Segments while there is no delay are one packet each: replies are written whole. */
    static inline void wire_prompt(int fd)
    {
        const int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    }

    /* Content that comes in pieces is acknowledged at once: a sender with Nagle's algorithm waits for it. */
    static inline void wire_acknowledge(int fd)
    {
    #ifdef TCP_QUICKACK
        const int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &one, sizeof one);
    #else
        (void)fd;
    #endif
    }

    static inline int wire_error(int fd)
    {
        int error = 0;
        socklen_t size = sizeof error;
        return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0 ? errno : error;
    }

    static inline int wire_would_block(void) { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }
    static inline int wire_errno(void) { return errno; }

    static inline ssize_t wire_send(int fd, const struct iovec *parts, int count)
    {
        if (count == 1) return send(fd, parts->iov_base, parts->iov_len, MSG_NOSIGNAL);
        struct msghdr message;
        memset(&message, 0, sizeof message);
        message.msg_iov = (struct iovec *)parts;
        message.msg_iovlen = count;
        return sendmsg(fd, &message, MSG_NOSIGNAL);
    }

    /* Timers of this thread fire when they are due, not up to 50 us later; returns what was before. */
    static inline long wire_sharpen(long slack)
    {
    #if defined(__linux__)
        const long before = prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0);
        prctl(PR_SET_TIMERSLACK, (unsigned long)slack, 0, 0, 0);
        return before;
    #else
        return slack;
    #endif
    }

    #ifdef WIRE_EPOLL
    typedef struct { int fd; struct epoll_event *found; int most; int coarse; } wire_poll;

    static inline int wire_open(wire_poll *poll, int most)
    {
        poll->most = most < 1024 ? most : 1024;
        poll->coarse = 0;
        poll->found = (struct epoll_event *)malloc(sizeof(struct epoll_event) * (size_t)poll->most);
        poll->fd = poll->found ? epoll_create1(EPOLL_CLOEXEC) : -1;
        return poll->fd < 0 ? -1 : 0;
    }

    static inline void wire_shut(wire_poll *poll)
    {
        if (poll->fd >= 0) close(poll->fd);
        free(poll->found);
        poll->fd = -1;
        poll->found = NULL;
    }

    static inline int wire_set(wire_poll *poll, int how, int fd, uint32_t slot, int events)
    {
        struct epoll_event event;
        memset(&event, 0, sizeof event);
        event.events = (events & WIRE_READ ? EPOLLIN : 0) | (events & WIRE_WRITE ? EPOLLOUT : 0);
        event.data.u32 = slot;
        return epoll_ctl(poll->fd, how, fd, &event);
    }

    static inline int wire_watch(wire_poll *poll, int fd, uint32_t slot, int events) { return wire_set(poll, EPOLL_CTL_ADD, fd, slot, events); }
    static inline int wire_change(wire_poll *poll, int fd, uint32_t slot, int events) { return wire_set(poll, EPOLL_CTL_MOD, fd, slot, events); }
    /* Closing a descriptor takes it out of an epoll set. */
    static inline void wire_forget(wire_poll *poll, uint32_t slot) { (void)poll; (void)slot; }

    /* At most `most` of `out` are filled; waits up to `ns`. */
    static inline int wire_wait(wire_poll *poll, wire_event *out, int most, int64_t ns)
    {
        int count = -1;
        if (most > poll->most) most = poll->most;
    #ifdef SYS_epoll_pwait2
        if (!poll->coarse) {
            const struct { int64_t seconds, ns; } limit = {ns / 1000000000, ns % 1000000000};
            count = (int)syscall(SYS_epoll_pwait2, poll->fd, poll->found, most, &limit, NULL, (size_t)8);
            if (count < 0 && errno == ENOSYS) poll->coarse = 1;
        }
        if (poll->coarse)
    #endif
            /* Rounded down: near its time the caller asks again and again, and is late for nobody. */
            count = epoll_wait(poll->fd, poll->found, most, (int)(ns / 1000000));
        for (int i = 0; i < count; i++) {
            const uint32_t events = poll->found[i].events;
            out[i].slot = poll->found[i].data.u32;
            out[i].events = (events & (EPOLLIN | EPOLLERR | EPOLLHUP) ? WIRE_READ : 0) | (events & (EPOLLOUT | EPOLLERR) ? WIRE_WRITE : 0);
        }
        return count < 0 ? (errno == EINTR ? 0 : -1) : count;
    }
    #else
    typedef struct { struct pollfd *all; int most, highest; } wire_poll;

    static inline int wire_open(wire_poll *poll, int most)
    {
        poll->all = (struct pollfd *)malloc(sizeof(struct pollfd) * (size_t)most);
        if (!poll->all) return -1;
        poll->most = most;
        poll->highest = 0;
        for (int i = 0; i < most; i++) poll->all[i].fd = -1;
        return 0;
    }

    static inline void wire_shut(wire_poll *poll) { free(poll->all); poll->all = NULL; }

    static inline int wire_change(wire_poll *poll, int fd, uint32_t slot, int events)
    {
        struct pollfd *one = &poll->all[slot];
        one->fd = fd;
        one->events = (events & WIRE_READ ? POLLIN : 0) | (events & WIRE_WRITE ? POLLOUT : 0);
        if ((int)slot >= poll->highest) poll->highest = (int)slot + 1;
        return 0;
    }

    static inline int wire_watch(wire_poll *poll, int fd, uint32_t slot, int events) { return wire_change(poll, fd, slot, events); }
    static inline void wire_forget(wire_poll *poll, uint32_t slot) { poll->all[slot].fd = -1; }

    static inline int wire_wait(wire_poll *set, wire_event *out, int most, int64_t ns)
    {
        int found = 0, count = poll(set->all, (nfds_t)set->highest, (int)(ns / 1000000));
        if (count < 0) return errno == EINTR ? 0 : -1;
        for (int i = 0; i < set->highest && count > 0 && found < most; i++) {
            const int events = set->all[i].revents;
            if (set->all[i].fd < 0 || !events) continue;
            count--;
            out[found].slot = (uint32_t)i;
            out[found++].events = (events & (POLLIN | POLLERR | POLLHUP | POLLNVAL) ? WIRE_READ : 0) | (events & (POLLOUT | POLLERR) ? WIRE_WRITE : 0);
        }
        return found;
    }
    #endif
    """
    enum: WIRE_READ
    enum: WIRE_WRITE
    ctypedef struct wire_event:
        uint32_t slot
        int events
    ctypedef struct wire_address:
        pass
    ctypedef struct wire_poll:
        pass
    struct iovec:
        void* iov_base
        size_t iov_len
    int64_t wire_now() noexcept nogil
    int wire_resolve(wire_address* to, const char* host, int port, unsigned int scope) noexcept nogil
    int wire_connect(const wire_address* to, int* done) noexcept nogil
    int wire_accept(int listener) noexcept nogil
    void wire_prompt(int fd) noexcept nogil
    void wire_acknowledge(int fd) noexcept nogil
    int wire_error(int fd) noexcept nogil
    int wire_would_block() noexcept nogil
    int wire_errno() noexcept nogil
    ssize_t wire_send(int fd, const iovec* parts, int count) noexcept nogil
    long wire_sharpen(long slack) noexcept nogil
    int wire_open(wire_poll* poll, int most) noexcept nogil
    void wire_shut(wire_poll* poll) noexcept nogil
    int wire_watch(wire_poll* poll, int fd, uint32_t slot, int events) noexcept nogil
    int wire_change(wire_poll* poll, int fd, uint32_t slot, int events) noexcept nogil
    void wire_forget(wire_poll* poll, uint32_t slot) noexcept nogil
    int wire_wait(wire_poll* poll, wire_event* out, int most, int64_t ns) noexcept nogil
