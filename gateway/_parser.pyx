# cython: auto_pickle=False, autotestdict=False, cdivision=True, emit_code_comments=False
"""The bytes: wire octets to commands, lines, content and replies, and back.

Owns every loop over octets. Knows no reply text, no order of commands, no I/O.
No state outside the objects. What each name promises stands in ``_parser.pyi``;
here stands how. RFC 5321 §4.1 (grammar), §4.5.2 (transparency), RFC 2920
(pipelining), RFC 3030 (BDAT), RFC 6531 (UTF-8 addresses).

Invariants: nothing depends on how the input was cut; what is held is one read and
a bounded rest; a line or content with a fault hands out none of its octets.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.unicode cimport PyUnicode_DecodeUTF8, PyUnicode_Substring
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy, memset

from zlib import crc32 as _crc32

cdef extern from "Python.h":
    object PyUnicode_New(Py_ssize_t size, Py_UCS4 maxchar)
    void* PyUnicode_DATA(object text)
    PyObject* new_octets "PyBytes_FromStringAndSize"(const char* octets, Py_ssize_t size) except NULL
    int _PyBytes_Resize(PyObject** octets, Py_ssize_t size) except -1
    void Py_SET_SIZE(PyObject* octets, Py_ssize_t size) noexcept

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    #define gateway_first(mask) __builtin_ctzll(mask)
    #define gateway_last(mask) (63 - __builtin_clzll(mask))
    #define gateway_always static inline __attribute__((always_inline))

    /* The one primitive of the fast walk: which of 64 octets are CR, LF and dot, one bit
       each, the first octet lowest, and whether any is NUL or over 127. */
    typedef struct {
        uint64_t cr, lf, dot;
        int nul, high;
    } gateway_block;

    #if defined(__SSE2__) && !defined(GATEWAY_PORTABLE)
    #include <emmintrin.h>

    gateway_always uint64_t gateway_equal(__m128i a, __m128i b, __m128i c, __m128i d, char octet)
    {
        const __m128i x = _mm_set1_epi8(octet);
        const uint32_t low = (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(a, x)) | (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(b, x)) << 16;
        const uint32_t high = (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(c, x)) | (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(d, x)) << 16;
        return low | (uint64_t)high << 32;
    }

    gateway_always void gateway_look(const unsigned char *p, gateway_block *is)
    {
        const __m128i a = _mm_loadu_si128((const __m128i *)p), b = _mm_loadu_si128((const __m128i *)(p + 16));
        const __m128i c = _mm_loadu_si128((const __m128i *)(p + 32)), d = _mm_loadu_si128((const __m128i *)(p + 48));
        is->cr = gateway_equal(a, b, c, d, 13);
        is->lf = gateway_equal(a, b, c, d, 10);
        is->dot = gateway_equal(a, b, c, d, 46);
        is->nul = _mm_movemask_epi8(_mm_cmpeq_epi8(_mm_min_epu8(_mm_min_epu8(a, b), _mm_min_epu8(c, d)), _mm_setzero_si128()));
        is->high = _mm_movemask_epi8(_mm_or_si128(_mm_or_si128(a, b), _mm_or_si128(c, d)));
    }
    #else
    gateway_always uint64_t gateway_equal(uint64_t word, uint64_t octet)
    {
        const uint64_t low = 0x7f7f7f7f7f7f7f7fu, x = word ^ octet * 0x0101010101010101u;
        const uint64_t found = ~(((x & low) + low) | x | low); /* the top bit of each octet that is equal */
        return (found >> 7) * 0x0102040810204080u >> 56;
    }

    gateway_always void gateway_look(const unsigned char *p, gateway_block *is)
    {
        uint64_t some = 0, none = 0, word;
        int i;
        is->cr = is->lf = is->dot = 0;
        for (i = 0; i < 8; i++) {
            memcpy(&word, p + 8 * i, 8);
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
            word = __builtin_bswap64(word);
    #endif
            is->cr |= gateway_equal(word, 13) << 8 * i;
            is->lf |= gateway_equal(word, 10) << 8 * i;
            is->dot |= gateway_equal(word, 46) << 8 * i;
            none |= gateway_equal(word, 0);
            some |= word;
        }
        is->nul = none != 0;
        is->high = (some & 0x8080808080808080u) != 0;
    }
    #endif

    /* Where the walk is in its lines: whether the last octet was a CR, whether it ended a line,
       octets of the line so far, of the longest so far; and whether an octet was over 127. */
    typedef struct {
        uint64_t cr, start;
        Py_ssize_t line, longest;
        int high;
    } gateway_lines;

    /* The lines between the first CRLF of a block and its last one. */
    gateway_always void gateway_within(gateway_lines *at, uint64_t crlf, uint64_t stuffed)
    {
        int k;
        Py_ssize_t line;
        uint64_t left;
        if (!crlf)
            return;
        k = gateway_first(crlf);
        for (left = crlf & (crlf - 1); left; left &= left - 1) {
            line = gateway_first(left) - k - 2 - (Py_ssize_t)(stuffed >> (k + 1) & 1);
            if (line > at->longest)
                at->longest = line;
            k = gateway_first(left);
        }
    }

    /* m octets whose CRLFs end at the bits of crlf, of which those at the bits of stuffed do not count. */
    gateway_always void gateway_count(gateway_lines *at, Py_ssize_t m, Py_ssize_t gone, uint64_t cr, uint64_t crlf, uint64_t stuffed)
    {
        int k, last;
        Py_ssize_t line;
        if (!crlf)
            at->line += m - gone;
        else {
            /* A removed dot is the first octet of its line: bit 0 for the line that goes on here. */
            k = gateway_first(crlf);
            line = at->line + k - 1 - (Py_ssize_t)(stuffed & 1);
            if (line > at->longest)
                at->longest = line;
            last = gateway_last(crlf);
            /* Lines that lie wholly inside a block have 62 octets at most. */
            if (at->longest < 62)
                gateway_within(at, crlf, stuffed);
            at->line = m - 1 - last - (last < 63 ? (Py_ssize_t)(stuffed >> (last + 1) & 1) : 0);
        }
        at->cr = cr >> (m - 1) & 1;
        at->start = crlf >> (m - 1) & 1;
    }

    /* Walks whole blocks of 64 octets that come out as they are and have no fault; stops before another, whose octets is then tells.
       Returns the octets that were walked. */
    #define GATEWAY_WALK(name, look) \
    static Py_ssize_t name(gateway_lines *at, gateway_block *is, const unsigned char *p, Py_ssize_t n, int dots) \
    { \
        gateway_lines here = *at; \
        Py_ssize_t i = 0; \
        uint64_t stuffed; \
        for (; i + 64 <= n; i += 64) { \
            look(p + i, is); \
            stuffed = dots ? (is->lf << 1 | here.start) & is->dot : 0; \
            if (((is->cr << 1 | here.cr) ^ is->lf) | stuffed | (uint64_t)is->nul) \
                break; \
            here.high |= is->high; \
            gateway_count(&here, 64, 0, is->cr, is->lf, 0); \
        } \
        *at = here; \
        return i; \
    }

    GATEWAY_WALK(gateway_walk_any, gateway_look)

    #if defined(__x86_64__) && defined(__GNUC__) && !defined(GATEWAY_PORTABLE) && !defined(GATEWAY_BASELINE)
    #include <immintrin.h>

    __attribute__((target("avx2,bmi")))
    gateway_always uint64_t gateway_equal_wide(__m256i a, __m256i b, char octet)
    {
        const __m256i x = _mm256_set1_epi8(octet);
        return (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, x)) | (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(b, x)) << 32;
    }

    __attribute__((target("avx2,bmi")))
    gateway_always void gateway_look_wide(const unsigned char *p, gateway_block *is)
    {
        const __m256i a = _mm256_loadu_si256((const __m256i *)p), b = _mm256_loadu_si256((const __m256i *)(p + 32));
        is->cr = gateway_equal_wide(a, b, 13);
        is->lf = gateway_equal_wide(a, b, 10);
        is->dot = gateway_equal_wide(a, b, 46);
        is->nul = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_min_epu8(a, b), _mm256_setzero_si256()));
        is->high = _mm256_movemask_epi8(_mm256_or_si256(a, b));
    }

    __attribute__((target("avx2,bmi")))
    GATEWAY_WALK(gateway_walk_first, gateway_look_wide)

    /* Line ends of a block whose CRLFs are whole, as gateway_count does it but without a branch: where no line ends, this one
       goes on, and has 63 octets more at the least. */
    __attribute__((target("bmi")))
    gateway_always void gateway_ends(gateway_lines *at, uint64_t lf)
    {
        const Py_ssize_t line = at->line + (Py_ssize_t)_tzcnt_u64(lf) - 1;
        at->longest = line > at->longest ? line : at->longest;
        at->line = lf ? 63 - gateway_last(lf) : at->line + 64;
        if (at->longest < 62)
            gateway_within(at, lf, 0);
    }

    /* Beyond the first block what came before an octet is read from memory, so that only the line ends become bits: a processor
       makes those from one register at a time. A CR without LF, an LF without CR, a NUL, or a dot that begins a line ends it. */
    __attribute__((target("avx2,bmi")))
    static Py_ssize_t gateway_walk_wide(gateway_lines *at, gateway_block *is, const unsigned char *p, Py_ssize_t n, int dots)
    {
        const __m256i cr = _mm256_set1_epi8(13), lf = _mm256_set1_epi8(10), dot = _mm256_set1_epi8(dots ? 46 : 0), none = _mm256_setzero_si256();
        __m256i a, b, before_a, before_b, lf_a, lf_b, bad, over = none;
        gateway_lines here;
        Py_ssize_t i = gateway_walk_first(at, is, p, n < 64 ? n : 64, dots);
        if (!i)
            return 0;
        for (here = *at; i + 64 <= n; i += 64) {
            a = _mm256_loadu_si256((const __m256i *)(p + i)), b = _mm256_loadu_si256((const __m256i *)(p + i + 32));
            before_a = _mm256_loadu_si256((const __m256i *)(p + i - 1)), before_b = _mm256_loadu_si256((const __m256i *)(p + i + 31));
            lf_a = _mm256_cmpeq_epi8(a, lf), lf_b = _mm256_cmpeq_epi8(b, lf);
            bad = _mm256_or_si256(_mm256_xor_si256(_mm256_cmpeq_epi8(before_a, cr), lf_a), _mm256_xor_si256(_mm256_cmpeq_epi8(before_b, cr), lf_b));
            bad = _mm256_or_si256(bad, _mm256_cmpeq_epi8(_mm256_min_epu8(a, b), none));
            bad = _mm256_or_si256(bad, _mm256_and_si256(_mm256_cmpeq_epi8(a, dot), _mm256_cmpeq_epi8(before_a, lf)));
            bad = _mm256_or_si256(bad, _mm256_and_si256(_mm256_cmpeq_epi8(b, dot), _mm256_cmpeq_epi8(before_b, lf)));
            if (!_mm256_testz_si256(bad, bad)) {
                gateway_look_wide(p + i, is);
                break;
            }
            over = _mm256_or_si256(over, _mm256_or_si256(a, b));
            gateway_ends(&here, (uint32_t)_mm256_movemask_epi8(lf_a) | (uint64_t)(uint32_t)_mm256_movemask_epi8(lf_b) << 32);
        }
        here.cr = p[i - 1] == 13;
        here.start = p[i - 1] == 10;
        here.high |= _mm256_movemask_epi8(over);
        *at = here;
        return i;
    }

    #ifndef GATEWAY_AVX2
    /* The same with 64 octets in one register. */
    __attribute__((target("avx512bw,avx2,bmi")))
    static Py_ssize_t gateway_walk_widest(gateway_lines *at, gateway_block *is, const unsigned char *p, Py_ssize_t n, int dots)
    {
        const __m512i cr = _mm512_set1_epi8(13), lf = _mm512_set1_epi8(10), dot = _mm512_set1_epi8(dots ? 46 : 0);
        __m512i a, before, over = _mm512_setzero_si512();
        gateway_lines here;
        uint64_t ends, bad;
        Py_ssize_t i = gateway_walk_first(at, is, p, n < 64 ? n : 64, dots);
        if (!i)
            return 0;
        for (here = *at; i + 64 <= n; i += 64) {
            a = _mm512_loadu_si512(p + i), before = _mm512_loadu_si512(p + i - 1);
            ends = _mm512_cmpeq_epi8_mask(a, lf);
            bad = (_mm512_cmpeq_epi8_mask(before, cr) ^ ends) | _mm512_testn_epi8_mask(a, a);
            if (bad | _mm512_mask_cmpeq_epi8_mask(_mm512_cmpeq_epi8_mask(before, lf), a, dot)) {
                gateway_look_wide(p + i, is);
                break;
            }
            over = _mm512_or_si512(over, a);
            gateway_ends(&here, ends);
        }
        here.cr = p[i - 1] == 13;
        here.start = p[i - 1] == 10;
        here.high |= _mm512_movepi8_mask(over) != 0;
        *at = here;
        return i;
    }
    #endif

    static Py_ssize_t (*gateway_walk)(gateway_lines *, gateway_block *, const unsigned char *, Py_ssize_t, int) = gateway_walk_any;

    static void gateway_choose(void)
    {
        __builtin_cpu_init();
        if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi"))
            return;
        gateway_walk = gateway_walk_wide;
    #ifndef GATEWAY_AVX2
        if (__builtin_cpu_supports("avx512bw"))
            gateway_walk = gateway_walk_widest;
    #endif
    }
    #else
    #define gateway_walk gateway_walk_any
    #define gateway_choose() ((void)0)
    #endif

    /* Octets before the first control character (0-31, 127); high gets a bit set where one of
       them may be over 127. */
    static inline Py_ssize_t gateway_text(const unsigned char *p, Py_ssize_t n, int *high)
    {
        Py_ssize_t i = 0;
        unsigned char seen = 0;
    #if defined(__SSE2__) && !defined(GATEWAY_PORTABLE)
        const __m128i low = _mm_set1_epi8(31), delete = _mm_set1_epi8(127);
        int wide = 0;
        for (; i + 16 <= n; i += 16) {
            const __m128i x = _mm_loadu_si128((const __m128i *)(p + i));
            const int control = _mm_movemask_epi8(_mm_or_si128(_mm_cmpeq_epi8(_mm_min_epu8(x, low), x), _mm_cmpeq_epi8(x, delete)));
            const int over = _mm_movemask_epi8(x);
            if (control) {
                *high = wide | (over & ((control & -control) - 1));
                return i + __builtin_ctz(control);
            }
            wide |= over;
        }
        seen = wide ? 128 : 0;
    #endif
        for (; i < n && p[i] > 31 && p[i] != 127; i++)
            seen |= p[i];
        *high = seen & 128;
        return i;
    }

    /* CRC-32 of n octets, n a multiple of 16 and at least 64, by multiplication without carry: Gopal and others, "Fast CRC
       Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009). Each constant is x^k mod P with its
       bits reflected, or the reflected P and its quotient at the end. crc goes in and comes out inverted. */
    #if defined(__x86_64__) && defined(__GNUC__) && !defined(GATEWAY_PORTABLE)
    #include <immintrin.h>

    static int gateway_can_fold(void)
    {
        __builtin_cpu_init();
        return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    }

    __attribute__((target("pclmul,sse4.1")))
    static inline __m128i gateway_fold_into(__m128i x, __m128i by, __m128i next)
    {
        return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)), next);
    }

    __attribute__((target("pclmul,sse4.1")))
    static uint32_t gateway_fold(const unsigned char *p, Py_ssize_t n, uint32_t crc)
    {
        const __m128i by_512 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by_128 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
        const __m128i by_64 = _mm_set_epi64x(0, 0x163cd6124), barrett = _mm_set_epi64x(0x1f7011641, 0x1db710641);
        const __m128i low = _mm_setr_epi32(-1, 0, -1, 0);
        __m128i a = _mm_xor_si128(_mm_loadu_si128((const __m128i *)p), _mm_cvtsi32_si128((int)crc));
        __m128i b = _mm_loadu_si128((const __m128i *)(p + 16)), c = _mm_loadu_si128((const __m128i *)(p + 32));
        __m128i d = _mm_loadu_si128((const __m128i *)(p + 48)), x;
        for (p += 64, n -= 64; n >= 64; p += 64, n -= 64) {
            a = gateway_fold_into(a, by_512, _mm_loadu_si128((const __m128i *)p));
            b = gateway_fold_into(b, by_512, _mm_loadu_si128((const __m128i *)(p + 16)));
            c = gateway_fold_into(c, by_512, _mm_loadu_si128((const __m128i *)(p + 32)));
            d = gateway_fold_into(d, by_512, _mm_loadu_si128((const __m128i *)(p + 48)));
        }
        a = gateway_fold_into(gateway_fold_into(gateway_fold_into(a, by_128, b), by_128, c), by_128, d);
        for (; n >= 16; p += 16, n -= 16)
            a = gateway_fold_into(a, by_128, _mm_loadu_si128((const __m128i *)p));
        a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by_128, 0x10));
        x = _mm_srli_si128(a, 4);
        a = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(a, low), by_64, 0x00), x);
        x = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(a, low), barrett, 0x10), low);
        a = _mm_xor_si128(_mm_clmulepi64_si128(x, barrett, 0x00), a);
        return (uint32_t)_mm_extract_epi32(a, 1);
    }
    #else
    #define gateway_can_fold() 0
    static uint32_t gateway_fold(const unsigned char *p, Py_ssize_t n, uint32_t crc) { (void)p; (void)n; return crc; }
    #endif
    """
    ctypedef struct Block "gateway_block":
        uint64_t cr
        uint64_t lf
        uint64_t dot
        int nul
        int high
    ctypedef struct Lines "gateway_lines":
        uint64_t cr
        uint64_t start
        Py_ssize_t line
        Py_ssize_t longest
        int high
    void look "gateway_look"(const unsigned char* p, Block* block) noexcept nogil
    void count_lines "gateway_count"(Lines* at, Py_ssize_t m, Py_ssize_t gone, uint64_t cr, uint64_t crlf, uint64_t stuffed) noexcept nogil
    Py_ssize_t walk_clean "gateway_walk"(Lines* at, Block* block, const unsigned char* p, Py_ssize_t n, bint dots) noexcept nogil
    void choose_walk "gateway_choose"()
    Py_ssize_t line_text "gateway_text"(const unsigned char* p, Py_ssize_t n, int* high) noexcept nogil
    int first_bit "gateway_first"(uint64_t mask) noexcept nogil
    bint can_fold "gateway_can_fold"()
    uint32_t fold "gateway_fold"(const unsigned char* p, Py_ssize_t n, uint32_t crc) noexcept nogil

ctypedef const unsigned char* octets_t

LINE_LIMIT = 2048
FLOOD_LIMIT = 65536

cdef enum:
    FLOOD = 65536
    LABEL_OCTETS = 63
    DOMAIN_OCTETS = 255
    PATH_OCTETS = 256
    VERB_CHARACTERS = 64


# --- classes of octets ------------------------------------------------------------------

cdef enum:
    ATEXT = 1      # RFC 5321 §4.1.2, RFC 6531 §3.3: an octet over 127 is part of a valid UTF-8 sequence
    LET_DIG = 2
    KEYWORD = 4    # ALPHA / DIGIT / "-", ASCII only
    QTEXT = 8
    DCONTENT = 16
    VALUE = 32     # of a parameter

cdef unsigned char CLASS[256]
cdef unsigned char LOWER[256]


cdef void fill_tables() noexcept:
    cdef int c
    cdef unsigned char bits
    cdef bytes symbols = b"!#$%&'*+-/=?^_`{|}~"
    for c in range(256):
        bits = 0
        alnum = 48 <= c <= 57 or 65 <= c <= 90 or 97 <= c <= 122
        if alnum or c > 127 or c in symbols:
            bits |= ATEXT
        if alnum or c > 127:
            bits |= LET_DIG
        if alnum or c == c"-":
            bits |= KEYWORD
        if 32 <= c <= 126 and c != c'"' and c != c"\\" or c > 127:
            bits |= QTEXT
        if 33 <= c <= 90 or 94 <= c <= 126:
            bits |= DCONTENT
        if c > 32 and c != 127 and c != c"=":
            bits |= VALUE
        CLASS[c] = bits
        LOWER[c] = c + 32 if 65 <= c <= 90 else c


fill_tables()


# --- small pieces -----------------------------------------------------------------------

cdef inline str ascii_text(octets_t p, Py_ssize_t n):
    cdef object text
    if n == 0:
        return ""
    text = PyUnicode_New(n, 127)
    memcpy(PyUnicode_DATA(text), p, n)
    return <str>text


cdef inline str lower_text(octets_t p, Py_ssize_t n):
    """ASCII in lower case."""
    cdef object text = PyUnicode_New(n, 127)
    cdef unsigned char* q = <unsigned char*>PyUnicode_DATA(text)
    cdef Py_ssize_t i
    for i in range(n):
        q[i] = LOWER[p[i]]
    return <str>text


cdef inline str any_text(octets_t p, Py_ssize_t n, bint ascii):
    return ascii_text(p, n) if ascii else <str>PyUnicode_DecodeUTF8(<const char*>p, n, NULL)


cdef inline int characters(octets_t p, octets_t e) noexcept nogil:
    """Of valid UTF-8."""
    cdef int count = 0
    while p < e:
        count += (p[0] & 0xC0) != 0x80
        p += 1
    return count


cdef inline bint same_word(octets_t p, const char* word, Py_ssize_t n) noexcept nogil:
    """``word`` in upper case, at ``p`` in any case. Letters only: bit 5 is what tells the cases apart."""
    cdef Py_ssize_t i
    for i in range(n):
        if (p[i] & 0xDF) != <unsigned char>word[i]:
            return False
    return True



# --- addresses (RFC 5321 §4.1.2, RFC 6531 §3.3) --------------------------------------------

cdef octets_t read_domain(octets_t p, octets_t e) noexcept nogil:
    """The end of the Domain at ``p``, or NULL."""
    cdef octets_t start = p
    cdef octets_t label
    while True:
        label = p
        if p == e or not CLASS[p[0]] & LET_DIG:
            return NULL
        while p < e and (CLASS[p[0]] & LET_DIG or p[0] == c"-"):
            p += 1
        if (p - 1)[0] == c"-" or p - label > LABEL_OCTETS:
            return NULL
        if p == e or p[0] != c".":
            return p if p - start <= DOMAIN_OCTETS else NULL
        p += 1


cdef octets_t read_ipv4(octets_t p, octets_t e) noexcept nogil:
    """The end of a dotted quad, or NULL. No leading zeros: some read them as octal."""
    cdef int part, value
    cdef octets_t start
    for part in range(4):
        if part:
            if p == e or p[0] != c".":
                return NULL
            p += 1
        start = p
        value = 0
        while p < e and c"0" <= p[0] <= c"9":
            value = value * 10 + p[0] - c"0"
            p += 1
            if value > 255 or p - start > 3:
                return NULL
        if p == start or (p - start > 1 and start[0] == c"0"):
            return NULL
    return p


cdef bint is_ipv6(octets_t p, octets_t e) noexcept nogil:
    cdef int groups = 0
    cdef bint gap = False
    cdef octets_t start
    if e - p >= 2 and p[0] == c":" and p[1] == c":":
        gap = True
        p += 2
        if p == e:
            return True
    while True:
        start = p
        while p < e and p - start < 5 and (c"0" <= p[0] <= c"9" or c"a" <= (p[0] | 32) <= c"f"):
            p += 1
        if p == start or p - start > 4:
            return False
        if p < e and p[0] == c".":
            if read_ipv4(start, e) != e:
                return False
            groups += 2
            break
        groups += 1
        if p == e:
            break
        if p[0] != c":":
            return False
        p += 1
        if p < e and p[0] == c":":
            if gap:
                return False
            gap = True
            p += 1
            if p == e:
                break
        elif p == e:
            return False
    return groups <= 7 if gap else groups == 8


cdef octets_t read_literal(octets_t p, octets_t e) noexcept nogil:
    """The end of the address literal at ``p`` (which is ``[``), or NULL."""
    cdef octets_t start = p + 1
    cdef octets_t close = <octets_t>memchr(start, c"]", e - start)
    cdef octets_t tag
    if close == NULL or close + 1 - p > DOMAIN_OCTETS:
        return NULL
    p = start
    while p < close and CLASS[p[0]] & KEYWORD:
        p += 1
    if p < close and p[0] == c":":
        tag = p
        if tag == start or (tag - 1)[0] == c"-":
            return NULL
        if tag - start == 4 and same_word(start, b"IPV", 3) and start[3] == c"6":
            return close + 1 if is_ipv6(tag + 1, close) else NULL
        p += 1
        if p == close:
            return NULL
        while p < close:
            if not CLASS[p[0]] & DCONTENT:
                return NULL
            p += 1
        return close + 1
    return close + 1 if read_ipv4(start, close) == close else NULL


cdef octets_t read_local(octets_t p, octets_t e) noexcept nogil:
    """The end of the Local-part at ``p``, or NULL."""
    cdef octets_t start
    if p < e and p[0] == c'"':
        p += 1
        while p < e:
            if p[0] == c'"':
                return p + 1
            if p[0] == c"\\":
                p += 1
                if p == e or not 32 <= p[0] <= 126:
                    return NULL
            elif not CLASS[p[0]] & QTEXT:
                return NULL
            p += 1
        return NULL
    while True:
        start = p
        while p < e and CLASS[p[0]] & ATEXT:
            p += 1
        if p == start:
            return NULL
        if p == e or p[0] != c".":
            return p
        p += 1


cdef octets_t read_mailbox(octets_t p, octets_t e, octets_t* at) noexcept nogil:
    """The end of the Mailbox at ``p``, or NULL; ``at`` is where its ``@`` is."""
    p = read_local(p, e)
    if p == NULL or p == e or p[0] != c"@":
        return NULL
    at[0] = p
    p += 1
    if p < e and p[0] == c"[":
        return read_literal(p, e)
    return read_domain(p, e)


cdef octets_t read_route(octets_t p, octets_t e) noexcept nogil:
    """The end of the source route at ``p`` (which is ``@``), or NULL."""
    while p < e and p[0] == c"@":
        p = read_domain(p + 1, e)
        if p == NULL or p == e:
            return NULL
        if p[0] == c":":
            return p + 1
        if p[0] != c",":
            return NULL
        p += 1
    return NULL


cdef bint has_odd_controls(octets_t p, octets_t e) noexcept nogil:
    """U+0080–U+009F, U+2028 or U+2029 in valid UTF-8: line ends and controls to those who read text."""
    while p < e:
        if p[0] == 0xC2 and p[1] < 0xA0:
            return True
        if p[0] == 0xE2 and p[1] == 0x80 and (p[2] == 0xA8 or p[2] == 0xA9):
            return True
        p += 1
    return False


def parse_address(text: str) -> tuple[str, str] | None:
    cdef bytes octets
    cdef octets_t p, e
    cdef octets_t at = NULL
    cdef bint ascii
    cdef Py_ssize_t n
    try:
        octets = text.encode()
    except UnicodeEncodeError:
        return None
    n = PyBytes_GET_SIZE(octets)
    p = <octets_t>PyBytes_AS_STRING(octets)
    e = p + n
    if n + 2 > PATH_OCTETS or read_mailbox(p, e, &at) != e:
        return None
    ascii = n == len(text)
    if not ascii and has_odd_controls(p, e):
        return None
    return text[:characters(p, at)], text[characters(p, at) + 1:].lower()


# --- commands -----------------------------------------------------------------------------

cdef enum Verb:
    OTHER
    MAIL
    RCPT
    DATA
    BDAT
    RSET
    QUIT
    EHLO
    HELO
    LHLO
    NOOP
    AUTH
    HELP
    VRFY
    EXPN
    STARTTLS

cdef tuple VERBS = ("", "MAIL", "RCPT", "DATA", "BDAT", "RSET", "QUIT", "EHLO", "HELO", "LHLO", "NOOP", "AUTH", "HELP", "VRFY", "EXPN", "STARTTLS")


cdef Verb read_verb(octets_t p, Py_ssize_t n) noexcept nogil:
    cdef unsigned char word[8]
    cdef Py_ssize_t i
    if n == 4:
        for i in range(4):
            word[i] = p[i] & 0xDF
        if memcmp(word, b"RCPT", 4) == 0:
            return RCPT
        if memcmp(word, b"MAIL", 4) == 0:
            return MAIL
        if memcmp(word, b"DATA", 4) == 0:
            return DATA
        if memcmp(word, b"BDAT", 4) == 0:
            return BDAT
        if memcmp(word, b"RSET", 4) == 0:
            return RSET
        if memcmp(word, b"QUIT", 4) == 0:
            return QUIT
        if memcmp(word, b"EHLO", 4) == 0:
            return EHLO
        if memcmp(word, b"HELO", 4) == 0:
            return HELO
        if memcmp(word, b"LHLO", 4) == 0:
            return LHLO
        if memcmp(word, b"NOOP", 4) == 0:
            return NOOP
        if memcmp(word, b"AUTH", 4) == 0:
            return AUTH
        if memcmp(word, b"HELP", 4) == 0:
            return HELP
        if memcmp(word, b"VRFY", 4) == 0:
            return VRFY
        if memcmp(word, b"EXPN", 4) == 0:
            return EXPN
    elif n == 8 and same_word(p, b"STARTTLS", 8):
        return STARTTLS
    return OTHER


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class Command:
    cdef readonly str verb
    cdef readonly str fault
    cdef readonly str argument
    cdef readonly bint source_routed
    cdef readonly bint ascii
    cdef readonly bint last
    cdef readonly long long chunk_size
    # Made when asked for: which characters of the argument a mailbox, its @ and its end are (0: none).
    cdef int path_start
    cdef int path_at
    cdef int path_end
    cdef str _address
    cdef str _local
    cdef str _domain
    cdef dict _params

    def __cinit__(self):
        self.verb = self.argument = ""

    cdef inline str made_address(self):
        if self._address is None and self.path_end:
            self._address = PyUnicode_Substring(self.argument, self.path_start, self.path_end)
        return self._address

    cdef inline str made_local(self):
        if self._local is None:
            self._local = PyUnicode_Substring(self.argument, self.path_start, self.path_at)
        return self._local

    cdef inline str made_domain(self):
        cdef octets_t p
        if self._domain is None:
            if self.path_end == 0:
                self._domain = ""
            elif self.ascii:
                p = <octets_t>PyUnicode_DATA(self.argument)
                self._domain = lower_text(p + self.path_at + 1, self.path_end - self.path_at - 1)
            else:
                self._domain = (<str>PyUnicode_Substring(self.argument, self.path_at + 1, self.path_end)).lower()
        return self._domain

    cdef inline dict made_params(self):
        if self._params is None:
            self._params = {}
        return self._params

    @property
    def address(self):
        return self.made_address()

    @property
    def local(self):
        return self.made_local()

    @property
    def domain(self):
        return self.made_domain()

    @property
    def params(self):
        return self.made_params()

    def path(self):
        return self.made_address(), self.made_local(), self.made_domain(), self.made_params(), self.ascii


cdef inline Command new_command(str verb, str fault):
    cdef Command command = Command.__new__(Command)
    command.verb = verb
    command.fault = fault
    return command


cdef str read_keyword(octets_t p, Py_ssize_t n):
    """A parameter's keyword in upper case; the usual ones as one shared string."""
    if n == 4:
        if same_word(p, b"SIZE", 4):
            return "SIZE"
        if same_word(p, b"BODY", 4):
            return "BODY"
        if same_word(p, b"AUTH", 4):
            return "AUTH"
    elif n == 5:
        if same_word(p, b"ORCPT", 5):
            return "ORCPT"
        if same_word(p, b"ENVID", 5):
            return "ENVID"
    elif n == 6 and same_word(p, b"NOTIFY", 6):
        return "NOTIFY"
    elif n == 3 and same_word(p, b"RET", 3):
        return "RET"
    elif n == 8 and p[7] == c"8" and same_word(p, b"SMTPUTF", 7):
        return "SMTPUTF8"
    return ascii_text(p, n).upper()


cdef str read_params(Command command, octets_t p, octets_t e):
    """Reads what follows a path; gives back a fault or None."""
    cdef octets_t start
    cdef str keyword, value
    cdef dict params = {}
    while True:
        if p == e:
            command._params = params
            return None
        while p < e and p[0] == c" ":
            p += 1
        start = p
        if p == e or not CLASS[p[0]] & KEYWORD or p[0] == c"-":
            return "parameter"
        while p < e and CLASS[p[0]] & KEYWORD:
            p += 1
        keyword = read_keyword(start, p - start)
        value = None
        if p < e and p[0] == c"=":
            p += 1
            start = p
            while p < e and CLASS[p[0]] & VALUE:
                p += 1
            if p == start:
                return "parameter"
            value = any_text(start, p - start, command.ascii)
        if p < e and p[0] != c" ":
            return "parameter"
        if keyword in params:
            return "duplicate"
        params[keyword] = value


cdef str read_path(Command command, octets_t p, octets_t e, bint forward):
    """Reads the argument of MAIL or RCPT; gives back a fault or None."""
    cdef octets_t argument = p
    cdef octets_t open, start, end
    cdef octets_t at = NULL
    if forward:
        if e - p < 3 or not same_word(p, b"TO", 2) or p[2] != c":":
            return "syntax"
        p += 3
    else:
        if e - p < 5 or not same_word(p, b"FROM", 4) or p[4] != c":":
            return "syntax"
        p += 5
    if p < e and p[0] == c" ":
        p += 1
    if p == e or p[0] != c"<":
        return "syntax"
    open = p
    p += 1
    start = p
    if not forward and p < e and p[0] == c">":
        end = p
    elif forward and e - p >= 11 and p[10] == c">" and same_word(p, b"POSTMASTER", 10):
        end = p + 10
    else:
        if p < e and p[0] == c"@":
            start = read_route(p, e)
            if start == NULL:
                return "path"
        end = read_mailbox(start, e, &at)
        if end == NULL or end == e or end[0] != c">" or end + 1 - open > PATH_OCTETS:
            return "path"
        if not command.ascii and has_odd_controls(open, end):
            return "path"
    p = end + 1
    if p < e and p[0] != c" ":
        return "syntax"
    if at == NULL:
        command._address = ascii_text(start, end - start)
        if end > start:
            command._local = "postmaster"
    elif command.ascii:
        command.path_start = <int>(start - argument)
        command.path_at = <int>(at - argument)
        command.path_end = <int>(end - argument)
    else:
        command.path_start = characters(argument, start)
        command.path_at = command.path_start + characters(start, at)
        command.path_end = command.path_at + characters(at, end)
    command.source_routed = start != open + 1
    return None if p == e else read_params(command, p, e)


cdef str read_chunk_size(Command command, octets_t p, octets_t e):
    """Reads the argument of BDAT; gives back a fault or None."""
    cdef octets_t start = p
    cdef unsigned long long size = 0
    cdef unsigned long long most = 0x7FFFFFFFFFFFFFFF
    cdef unsigned int digit
    while p < e and c"0" <= p[0] <= c"9":
        digit = p[0] - c"0"
        if size > (most - digit) // 10:
            return "chunk"
        size = size * 10 + digit
        p += 1
    if p == start:
        return "chunk"
    if p < e:
        if p[0] != c" ":
            return "chunk"
        while p < e and p[0] == c" ":
            p += 1
        if e - p != 4 or not same_word(p, b"LAST", 4):
            return "chunk"
        command.last = True
    command.chunk_size = <long long>size
    return None


cdef Py_ssize_t count_words(octets_t p, octets_t e) noexcept nogil:
    cdef Py_ssize_t words = 0
    cdef bint inside = False
    while p < e:
        if p[0] == c" ":
            inside = False
        elif not inside:
            inside = True
            words += 1
        p += 1
    return words


cdef Command read_command(octets_t p, Py_ssize_t n, bint ascii):
    """A line of ``n`` octets, free of controls, CRLF cut off."""
    cdef octets_t e = p + n
    cdef octets_t q
    cdef Verb verb
    cdef str word = None
    cdef str argument
    cdef Command command
    q = <octets_t>memchr(p, c" ", n)
    if q == NULL:
        q = e
    verb = read_verb(p, q - p)
    try:
        if verb == OTHER:
            # Of bytes: upper() of text would make a verb of what is none (U+017F becomes S).
            word = p[:q - p].upper().decode()[:VERB_CHARACTERS]
        while q < e and q[0] == c" ":
            q += 1
        while q < e and (e - 1)[0] == c" ":
            e -= 1
        argument = any_text(q, e - q, ascii)
    except UnicodeDecodeError:
        return new_command("", "utf8")
    command = new_command(<str>VERBS[<int>verb] if word is None else word, None)
    command.ascii = ascii
    command.argument = argument
    if verb == RCPT or verb == MAIL:
        command.fault = read_path(command, q, e, verb == RCPT)
    elif verb == BDAT:
        command.fault = read_chunk_size(command, q, e)
    elif verb == DATA or verb == RSET or verb == QUIT or verb == STARTTLS:
        if q < e:
            command.fault = "syntax"
    elif verb == EHLO or verb == HELO or verb == LHLO:
        if count_words(q, e) != 1:
            command.fault = "syntax"
    elif verb == AUTH:
        if not 1 <= count_words(q, e) <= 2:
            command.fault = "syntax"
    elif verb == VRFY and q == e:
        command.fault = "syntax"
    return command


# --- content ------------------------------------------------------------------------------

cdef enum Place:
    MIDDLE           # inside a line
    START            # after CRLF, or nothing came yet
    DOT              # START and a dot, which is held back
    DOT_CR           # START, a dot and CR, both held back
    BARE_START       # the same after a bare LF that is read as CRLF
    BARE_DOT
    BARE_DOT_CR

cdef enum:
    FAULT_NEWLINE = 1
    FAULT_NUL = 2

cdef struct Walk:
    Place place
    bint cr            # the last octet was a CR that waits for its LF
    bint normalize
    bint finished
    bint high
    int fault
    Py_ssize_t line    # octets of the line so far, with a CR that waits
    Py_ssize_t longest
    long long size


cdef inline void end_line(Walk* w, Py_ssize_t octets, Place place) noexcept nogil:
    if octets > w.longest:
        w.longest = octets
    w.line = 0
    w.place = place


cdef inline unsigned char* give(Walk* w, unsigned char c, unsigned char* out) noexcept nogil:
    """One octet of content, transparency already taken off."""
    if w.cr:
        w.cr = False
        if c == c"\n":
            if out != NULL:
                out[0] = c
                out += 1
            w.size += 1
            end_line(w, w.line - 1, START)
            return out
        if not w.fault:
            w.fault = FAULT_NUL if c == 0 else FAULT_NEWLINE
    if c == c"\n":
        if w.normalize:
            if out != NULL:
                out[0] = c"\r"
                out[1] = c"\n"
                out += 2
            w.size += 2
            end_line(w, w.line, BARE_START)
            return out
        if not w.fault:
            w.fault = FAULT_NEWLINE
    elif c == c"\r":
        w.cr = True
    elif c == 0:
        if not w.fault:
            w.fault = FAULT_NUL
    elif c > 127:
        w.high = True
    w.place = MIDDLE
    w.line += 1
    w.size += 1
    if out != NULL:
        out[0] = c
        out += 1
    return out


cdef unsigned char* step(Walk* w, unsigned char c, unsigned char* out) noexcept nogil:
    """One octet of DATA (RFC 5321 §4.5.2). At most four octets come out."""
    if w.place == MIDDLE:
        return give(w, c, out)
    if w.place == START or w.place == BARE_START:
        if c == c".":
            w.place = DOT if w.place == START else BARE_DOT
            return out
        return give(w, c, out)
    if w.place == DOT or w.place == BARE_DOT:
        if c == c"\r":
            w.place = DOT_CR if w.place == DOT else BARE_DOT_CR
            return out
        return give(w, c, out)
    if c == c"\n":
        if w.place == DOT_CR:
            w.finished = True
            return out
        # A dot alone after a bare LF ends nothing and is no stuffing: it is the line.
        out = give(w, c".", out)
    out = give(w, c"\r", out)
    return give(w, c, out)


cdef enum Way:
    PASS             # stop before the first octet that does not come out as it is
    WRITE            # write what comes out
    DROP             # nobody wants it


cdef inline Py_ssize_t count_bits(uint64_t mask) noexcept nogil:
    cdef Py_ssize_t bits = 0
    while mask:
        bits += 1
        mask &= mask - 1
    return bits


cdef inline unsigned char* write_unstuffed(octets_t p, Py_ssize_t m, uint64_t stuffed, Py_ssize_t n, unsigned char* q) noexcept nogil:
    """Writes ``m`` octets of a block without its stuffed dots; ``n`` octets may be read, and
    64 more than are written may be overwritten."""
    cdef Py_ssize_t done = 0
    cdef int k
    if n >= 128:
        # Copies of a fixed size are cheaper than exact ones: each begins behind a dot and is
        # overwritten from the next one on.
        memcpy(q, p, 64)
        while stuffed:
            k = first_bit(stuffed)
            q += k - done
            done = k + 1
            memcpy(q, p + done, 64)
            stuffed &= stuffed - 1
    else:
        while stuffed:
            k = first_bit(stuffed)
            memcpy(q, p + done, k - done)
            q += k - done
            done = k + 1
            stuffed &= stuffed - 1
        memcpy(q, p + done, m - done)
    return q + m - done


cdef void note_faults(Walk* w, octets_t p, Py_ssize_t n, uint64_t bad, int nul, int high) noexcept nogil:
    """What is odd in a block: the first fault, octets over 127."""
    cdef octets_t zero
    cdef Py_ssize_t at
    if high and not w.high:
        for at in range(n):
            if p[at] > 127:
                w.high = True
                break
    if w.fault:
        return
    zero = <octets_t>memchr(p, 0, n) if nul else NULL
    # CR NUL is named by its NUL.
    if bad and (zero == NULL or first_bit(bad) < zero - p):
        w.fault = FAULT_NEWLINE
    elif zero != NULL:
        w.fault = FAULT_NUL


cdef Py_ssize_t walk_blocks(Walk* w, octets_t p, Py_ssize_t n, bint dots, Way way, unsigned char** out) noexcept nogil:
    """Walks 64 octets at a time; stops before what takes more thought: an end, a dot whose
    line is not all there, with ``normalize`` a bare LF, and with PASS any stuffed dot."""
    cdef uint64_t before, bad, crlf, stuffed, left, valid
    cdef int k
    cdef bint odd = False
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t m, gone
    cdef long long size = w.size
    cdef unsigned char* q = out[0]
    cdef unsigned char pad[64]
    cdef octets_t b
    cdef Block block
    cdef Lines at
    at.cr = w.cr
    at.start = w.place == START
    at.line = w.line
    at.longest = w.longest
    at.high = w.high
    while i < n:
        if n - i >= 64:
            # Odd blocks come one after the other, and so do clean ones.
            if odd:
                look(p + i, &block)
            else:
                m = walk_clean(&at, &block, p + i, n - i, dots)
                if m:
                    if way == WRITE:
                        memcpy(q, p + i, m)
                        q += m
                    size += m
                    i += m
                    if n - i < 64:
                        continue
            m = 64
            b = p + i
            valid = ~<uint64_t>0
        else:
            m = n - i
            memset(pad, c"x", 64)
            memcpy(pad, p + i, m)
            b = pad
            valid = (<uint64_t>1 << m) - 1
            look(b, &block)
        before = block.cr << 1 | at.cr
        bad = (before ^ block.lf) & valid
        crlf = block.lf & before
        stuffed = 0
        gone = 0
        if dots:
            stuffed = (crlf << 1 | at.start) & block.dot
        odd = stuffed != 0 or bad != 0 or block.nul
        if odd or block.high:
            if bad and w.normalize and block.lf & ~before:
                k = first_bit(block.lf & ~before)
                if k < m:
                    m = k
            if stuffed:
                left = stuffed
                while left:
                    k = first_bit(left)
                    if k >= m:
                        break
                    if way == PASS or i + k + 1 >= n:
                        m = k
                    elif p[i + k + 1] == c"\r" and (i + k + 2 >= n or p[i + k + 2] == c"\n"):
                        m = k
                    left &= left - 1
            if m < 64:
                if m == 0:
                    break
                valid = (<uint64_t>1 << m) - 1
                bad &= valid
                crlf &= valid
                stuffed &= valid
            if bad or block.nul or block.high and not at.high:
                note_faults(w, b, m, bad, block.nul, block.high)
                at.high |= w.high
        if way == WRITE:
            if stuffed:
                q = write_unstuffed(p + i, m, stuffed, n - i, q)
            else:
                memcpy(q, p + i, m)
                q += m
        if stuffed:
            gone = count_bits(stuffed)
        count_lines(&at, m, gone, block.cr, crlf, stuffed)
        size += m - gone
        i += m
        if m < 64:
            break
    w.cr = at.cr != 0
    w.place = START if at.start else MIDDLE
    w.line = at.line
    w.longest = at.longest
    w.high = at.high != 0
    w.size = size
    out[0] = q
    return i


cdef Py_ssize_t pass_through(Walk* w, octets_t p, Py_ssize_t n, bint dots) noexcept nogil:
    """Walks over the octets that come out as they are; stops before the first that does not."""
    cdef unsigned char* none = NULL
    if dots and w.place != MIDDLE and w.place != START:
        if w.place != BARE_START or p[0] == c"." or p[0] == c"\n":
            return 0
    return walk_blocks(w, p, n, dots, PASS, &none)


cdef Py_ssize_t rewrite(Walk* w, octets_t p, Py_ssize_t n, bint dots, unsigned char** out) noexcept nogil:
    """Walks on, writing to ``out`` what comes out; stops behind the end of the content."""
    cdef Py_ssize_t i = 0
    cdef Way way = DROP if out[0] == NULL else WRITE
    while i < n:
        if not dots:
            out[0] = give(w, p[i], out[0])
            i += 1
        else:
            while i < n:
                out[0] = step(w, p[i], out[0])
                i += 1
                if w.place == MIDDLE or w.place == START or w.finished:
                    break
            if w.finished or i == n:
                return i
        i += walk_blocks(w, p + i, n - i, dots, way, out)
    return i


# --- the header section ---------------------------------------------------------------------

cdef enum:
    H_START          # at the start of a line
    H_CR             # a CR is all of the line so far
    H_NAME           # inside what may become "Received"
    H_COLON          # behind "Received"
    H_REST           # anywhere else in a line
    H_OVER           # the empty line came

cdef struct Header:
    int place
    int matched
    bint cr
    Py_ssize_t size
    Py_ssize_t fields
    Py_ssize_t hops


cdef const char* RECEIVED = b"RECEIVED"


cdef void count_header(Header* h, octets_t p, Py_ssize_t n) noexcept nogil:
    cdef octets_t e = p + n
    cdef octets_t lf
    cdef unsigned char c
    while p < e:
        c = p[0]
        if h.place == H_START:
            if c == c"\r":
                h.place = H_CR
                p += 1
                continue
            h.cr = False
            if c == c" " or c == c"\t":
                h.place = H_REST
            else:
                h.fields += 1
                h.place = H_REST
                if (c & 0xDF) == c"R":
                    h.place = H_NAME
                    h.matched = 1
            h.size += 1
            p += 1
        elif h.place == H_CR:
            if c == c"\n":
                h.place = H_OVER
                return
            h.size += 1
            h.fields += 1
            h.place = H_REST
        elif h.place == H_NAME:
            if (c & 0xDF) != <unsigned char>RECEIVED[h.matched]:
                h.place = H_REST
                continue
            h.matched += 1
            if h.matched == 8:
                h.place = H_COLON
            h.size += 1
            p += 1
        elif h.place == H_COLON:
            if c != c" " and c != c"\t":
                if c == c":":
                    h.hops += 1
                h.place = H_REST
                continue
            h.size += 1
            p += 1
        else:
            lf = <octets_t>memchr(p, c"\n", e - p)
            if lf == NULL:
                h.size += e - p
                h.cr = (e - 1)[0] == c"\r"
                return
            h.size += lf + 1 - p
            if (lf - 1)[0] == c"\r" if lf > p else h.cr:
                h.place = H_START
            h.cr = False
            p = lf + 1


# --- the server's side ------------------------------------------------------------------------

cdef enum:
    # What one read may bring: most mail at once. Beyond 128 KiB malloc takes fresh pages from the kernel each time.
    READ_SIZE = 128 * 1024 - 256
    # From so many octets on the memory that was read into becomes the content; less is copied out of it.
    TAKEN_SIZE = 32 * 1024

@cython.final
@cython.no_gc
cdef class ReadBuffer:
    cdef Py_ssize_t room      # octets a read may bring
    cdef Py_ssize_t taken     # from so many on a content takes the memory with it
    cdef Py_ssize_t size      # octets that the last one brought, until they are fed; under 0 none was asked for
    cdef bytes octets         # what is read into; None while they are lent, and after they became content
    cdef PyObject* borrower   # the Receiver that takes them apart; it goes with it (Receiver.__dealloc__)

    def __cinit__(self, Py_ssize_t size=READ_SIZE, Py_ssize_t taken=TAKEN_SIZE):
        if size < 1 or taken < 1:
            raise ValueError(f"a buffer of {size} octets, taken from {taken} on")
        self.room = size
        self.taken = taken
        self.size = -1
        self.borrower = NULL

    def __getbuffer__(self, Py_buffer* view, int flags):
        if self.borrower != NULL:
            (<Receiver>self.borrower).keep()
        if self.octets is None:
            self.octets = PyBytes_FromStringAndSize(NULL, self.room)
        self.size = 0
        PyBuffer_FillInfo(view, self, PyBytes_AS_STRING(self.octets), self.room, 0, flags)

    def get_buffer(self, size_hint):
        return self

    def filled(self, Py_ssize_t n):
        if self.size < 0 or not 0 <= n <= self.room:
            raise ValueError(f"{n} octets were not read into this")
        self.size = n

    def __len__(self):
        return max(self.size, 0)

    def head(self):
        return b"" if self.size <= 0 else PyBytes_FromStringAndSize(PyBytes_AS_STRING(self.octets), min(self.size, 64))


@cython.final
@cython.no_gc
cdef class Receiver:
    cdef bytes data           # the read that is being taken apart, or the rest of one …
    cdef ReadBuffer lender    # … and whose it is, where it is borrowed
    cdef Py_ssize_t at        # octets of it already read
    cdef Py_ssize_t line_limit
    cdef Py_ssize_t auth_limit
    cdef Py_ssize_t skipped   # octets of an over-long line that are gone
    cdef bint flooded
    cdef bint binary
    cdef Walk walk
    cdef Header header
    cdef readonly str line_fault
    cdef readonly Py_ssize_t taken

    def __init__(self, line_limit: int = LINE_LIMIT, normalize: bool = False, auth_limit: int = 0):
        if not 2 <= line_limit <= FLOOD:
            raise ValueError(f"line_limit {line_limit} is not within 2-{FLOOD}")
        if not 0 <= auth_limit <= FLOOD:
            raise ValueError(f"auth_limit {auth_limit} is not within 0-{FLOOD}")
        self.line_limit = line_limit
        self.auth_limit = auth_limit
        self.walk.normalize = normalize
        self.begin()

    def __dealloc__(self):
        if self.lender is not None:
            self.lender.borrower = NULL

    def feed(self, data not None):
        if type(data) is bytes:
            if not self.flooded and PyBytes_GET_SIZE(data):
                self.append(<bytes>data)
        elif type(data) is ReadBuffer:
            self.borrow(<ReadBuffer>data)
        else:
            raise TypeError(f"{type(data).__name__} is neither bytes nor a ReadBuffer")

    cdef void append(self, bytes data):
        if self.lender is not None:
            self.keep()
        if self.data is not None:
            data = self.data[self.at:] + data if self.at else self.data + data
        self.data = data
        self.at = 0

    cdef void borrow(self, ReadBuffer lender):
        cdef Py_ssize_t n = lender.size
        lender.size = -1
        if self.flooded or n <= 0:
            return
        if self.data is not None:
            self.append(PyBytes_FromStringAndSize(PyBytes_AS_STRING(lender.octets), n))
            return
        self.data = lender.octets
        lender.octets = None
        Py_SET_SIZE(<PyObject*>self.data, n)
        PyBytes_AS_STRING(self.data)[n] = 0
        self.at = 0
        self.lender = lender
        lender.borrower = <PyObject*>self

    cdef void give_back(self):
        self.lender.octets = self.data
        self.lender.borrower = NULL
        self.lender = None

    cdef void keep(self):
        """What is left of a borrowed read becomes ours."""
        cdef bytes rest = PyBytes_FromStringAndSize(PyBytes_AS_STRING(self.data) + self.at, PyBytes_GET_SIZE(self.data) - self.at)
        self.give_back()
        self.data = rest
        self.at = 0

    cdef bytes leave(self, Py_ssize_t n, Py_ssize_t used):
        """The first ``n`` octets of a borrowed read, in its own memory; behind ``used`` the rest goes on."""
        cdef PyObject* made = <PyObject*>self.data
        cdef Py_ssize_t size = PyBytes_GET_SIZE(self.data)
        cdef bytes piece, rest = None
        if used < size:
            rest = PyBytes_FromStringAndSize(PyBytes_AS_STRING(self.data) + used, size - used)
        # What it has, so that it gives back what it does not need.
        Py_SET_SIZE(made, self.lender.room)
        self.lender.borrower = NULL
        self.lender = None
        Py_INCREF(<object>made)
        self.data = rest
        self.at = 0
        _PyBytes_Resize(&made, n)
        piece = <bytes>made
        Py_DECREF(piece)
        return piece

    cdef inline void let_go(self):
        if self.lender is not None:
            self.give_back()
        self.data = None
        self.at = 0

    @property
    def pending(self):
        return 0 if self.data is None else PyBytes_GET_SIZE(self.data) - self.at

    def discard(self):
        self.let_go()
        self.skipped = 0

    cdef inline void take(self, Py_ssize_t n):
        """``n`` more octets are read; a read that is used up is let go."""
        self.at += n
        if self.at == PyBytes_GET_SIZE(self.data):
            self.let_go()

    def command(self):
        cdef octets_t p
        cdef Py_ssize_t n
        cdef int high = 0
        cdef str fault
        cdef Command command
        n = self.next_line(self.auth_limit if self.auth_limit > self.line_limit and self.at_auth() else self.line_limit, &high)
        if n < 0:
            return None
        fault = self.line_fault
        if fault is not None:
            self.line_fault = None
            return new_command("", fault)
        p = <octets_t>PyBytes_AS_STRING(self.data) + self.at
        command = read_command(p, n, not high)
        self.take(n + 2)
        return command

    def line(self, Py_ssize_t limit):
        cdef bytes text
        cdef Py_ssize_t n
        cdef int high = 0
        if not 2 <= limit <= FLOOD:
            raise ValueError(f"limit {limit} is not within 2-{FLOOD}")
        n = self.next_line(limit, &high)
        if n < 0:
            return None
        if self.line_fault is not None:
            return b""
        text = PyBytes_FromStringAndSize(PyBytes_AS_STRING(self.data) + self.at, n)
        self.take(n + 2)
        return text

    def begin(self, binary: bool = False):
        cdef bint normalize = self.walk.normalize
        self.walk = Walk(place=START, cr=False, normalize=normalize, finished=False, high=False, fault=0, line=0, longest=0, size=0)
        self.header = Header(place=H_START, matched=0, cr=False, size=0, fields=0, hops=0)
        self.binary = binary
        self.taken = 0

    def content(self):
        cdef Py_ssize_t available
        if self.data is None or self.walk.finished:
            return None
        # Not within the call: the read may have to be nobody's but ours there (leave).
        available = PyBytes_GET_SIZE(self.data) - self.at
        return self.piece(available, True)

    @property
    def finished(self):
        return self.walk.finished

    def chunk(self, long long n):
        cdef Py_ssize_t available
        cdef object piece
        if n <= 0:
            raise ValueError(f"a chunk of which {n} octets are still to come")
        self.taken = 0
        if self.data is None:
            return None
        available = PyBytes_GET_SIZE(self.data) - self.at
        if n < available:
            available = <Py_ssize_t>n
        piece = self.piece(available, False)
        self.taken = available
        return b"" if piece is None else piece

    def end(self):
        if self.walk.cr and not self.walk.fault:
            self.walk.fault = FAULT_NEWLINE

    @property
    def content_fault(self):
        return self.content_fault_name()

    def facts(self):
        return (
            self.content_fault_name(),
            self.walk.size,
            self.longest_line(),
            self.walk.high,
            self.header.size,
            self.header.fields,
            self.header.hops,
        )

    @property
    def size(self):
        return self.walk.size

    @property
    def longest(self):
        return self.longest_line()

    @property
    def eight_bit(self):
        return self.walk.high

    @property
    def header_size(self):
        return self.header.size

    @property
    def header_fields(self):
        return self.header.fields

    @property
    def hops(self):
        return self.header.hops

    cdef inline str content_fault_name(self):
        if self.walk.fault == 0:
            return None
        return "newline" if self.walk.fault == FAULT_NEWLINE else "nul"

    cdef inline Py_ssize_t longest_line(self):
        cdef Py_ssize_t line = self.walk.line - self.walk.cr
        return max(line, self.walk.longest)

    cdef inline bint at_auth(self):
        """The next line is an AUTH command, as far as it is here and was not already too long."""
        cdef octets_t p
        if self.data is None or self.skipped or PyBytes_GET_SIZE(self.data) - self.at < 5:
            return False
        p = <octets_t>PyBytes_AS_STRING(self.data) + self.at
        return p[0] & 0xDF == c"A" and p[1] & 0xDF == c"U" and p[2] & 0xDF == c"T" and p[3] & 0xDF == c"H" and p[4] == c" "

    cdef Py_ssize_t next_line(self, Py_ssize_t limit, int* high) except -2:
        """Octets of the next line's text, CRLF not among them; -1 if it is not whole yet.
        With ``line_fault`` set the line is already taken and has no text."""
        cdef octets_t p, lf
        cdef Py_ssize_t n, length
        self.line_fault = None
        if self.data is None:
            return -1
        p = <octets_t>PyBytes_AS_STRING(self.data) + self.at
        n = PyBytes_GET_SIZE(self.data) - self.at
        if self.skipped == 0:
            length = line_text(p, n, high)
            if length + 1 < n and p[length] == c"\r" and p[length + 1] == c"\n" and length + 2 <= limit:
                return length
        lf = <octets_t>memchr(p, c"\n", n)
        length = self.skipped + (lf - p if lf != NULL else n)
        if length > FLOOD:
            self.flooded = True
            self.discard()
            self.line_fault = "flood"
            return 0
        if lf != NULL:
            self.skipped = 0
            self.take(lf + 1 - p)
            self.line_fault = "long" if length + 1 > limit else "newline"
            return 0
        if length >= limit:
            self.skipped = length
            self.let_go()
        elif self.lender is not None:
            self.keep()
        elif self.at:
            # What waits for its line end must not keep the whole read alive.
            self.data = self.data[self.at:]
            self.at = 0
        return -1

    cdef object piece(self, Py_ssize_t n, bint dots):
        """Walks over ``n`` octets of content and hands out what they say, or None."""
        cdef Walk* w = &self.walk
        cdef octets_t wire = <octets_t>PyBytes_AS_STRING(self.data) + self.at
        cdef octets_t p = wire
        cdef Py_ssize_t same, used, room
        cdef bint wanted = w.fault == 0 or self.header.place != H_OVER
        cdef unsigned char* out = NULL
        cdef PyObject* made = NULL
        cdef bytes piece = None
        if self.binary and not dots:
            same = n
            w.size += n
        else:
            same = pass_through(w, p, n, dots)
        used = same
        if same < n:
            if dots and w.place == START and n - same >= 3 and p[same] == c"." and p[same + 1] == c"\r" and p[same + 2] == c"\n":
                w.finished = True
                used += 3
            elif wanted:
                room = same + (n - same) * (2 if w.normalize else 1) + 72
                made = new_octets(NULL, room)
                out = <unsigned char*>PyBytes_AS_STRING(<object>made)
                memcpy(out, p, same)
                p = out
                out += same
                used += rewrite(w, wire + same, n - same, dots, &out)
                same = out - p
            else:
                used += rewrite(w, p + same, n - same, dots, &out)
        if self.header.place != H_OVER:
            count_header(&self.header, p, same)
        if w.fault == 0 and same:
            if made != NULL:
                _PyBytes_Resize(&made, same)
                piece = <bytes>made
            elif self.lender is not None and self.at == 0 and same >= self.lender.taken:
                return self.leave(same, used)
            elif same == PyBytes_GET_SIZE(self.data) and self.lender is None:
                piece = self.data
            else:
                piece = PyBytes_FromStringAndSize(<const char*>p, same)
        if made != NULL:
            Py_DECREF(<object>made)
        self.take(used)
        return piece


# --- the client's side --------------------------------------------------------------------

cdef str reply_text(octets_t p, Py_ssize_t n):
    cdef Py_ssize_t i
    cdef str text = PyUnicode_DecodeUTF8(<const char*>p, n, b"replace")
    if not text.isprintable():
        text = "".join(["?" if c < " " or "\x7f" <= c <= "\x9f" or c in "\u2028\u2029\ufffd" else c for c in text])
    return text.replace("\ufffd", "?")


@cython.final
@cython.no_gc
cdef class ReplyReceiver:
    cdef bytes data
    cdef Py_ssize_t at
    cdef Py_ssize_t line_limit
    cdef Py_ssize_t reply_limit
    cdef Py_ssize_t total     # octets of the lines of a reply that is not whole yet
    cdef int code
    cdef list lines
    cdef readonly str fault

    def __init__(self, line_limit: int = 4096, reply_limit: int = 65536):
        if line_limit < 5 or reply_limit < line_limit:
            raise ValueError(f"limits {line_limit} and {reply_limit}: a line has 5 octets or more, a reply no less than a line")
        self.line_limit = line_limit
        self.reply_limit = reply_limit
        self.lines = []

    def feed(self, bytes data not None):
        if self.fault is not None or PyBytes_GET_SIZE(data) == 0:
            return
        if self.data is None:
            self.data = data
        else:
            self.data = self.data[self.at:] + data if self.at else self.data + data
        self.at = 0

    @property
    def pending(self):
        return self.total + (0 if self.data is None else PyBytes_GET_SIZE(self.data) - self.at)

    def discard(self):
        self.data = None
        self.at = 0
        self.total = 0
        self.lines = []

    cdef object fail(self, str fault):
        self.discard()
        self.fault = fault
        return None

    def reply(self):
        cdef octets_t p, lf
        cdef Py_ssize_t n, length, room
        cdef int code
        cdef list lines
        while self.data is not None:
            p = <octets_t>PyBytes_AS_STRING(self.data) + self.at
            n = PyBytes_GET_SIZE(self.data) - self.at
            room = min(self.line_limit, self.reply_limit - self.total)
            lf = <octets_t>memchr(p, c"\n", min(n, room))
            if lf == NULL:
                if n >= room:
                    return self.fail("long")
                if self.at:
                    self.data = self.data[self.at:]
                    self.at = 0
                return None
            length = lf - p
            if <octets_t>memchr(p, c"\r", length + 1) != lf - 1:
                return self.fail("newline")
            length -= 1
            code = 0
            if length >= 3 and c"2" <= p[0] <= c"5" and c"0" <= p[1] <= c"9" and c"0" <= p[2] <= c"9":
                code = (p[0] - c"0") * 100 + (p[1] - c"0") * 10 + p[2] - c"0"
            if not code or (length > 3 and p[3] != c" " and p[3] != c"-") or (self.lines and code != self.code):
                return self.fail("syntax")
            self.code = code
            self.lines.append(reply_text(p + 4, length - 4) if length > 4 else "")
            more = length > 3 and p[3] == c"-"
            self.total += length + 2
            self.at += length + 2
            if self.at == PyBytes_GET_SIZE(self.data):
                self.data = None
                self.at = 0
            if not more:
                lines = self.lines
                self.lines = []
                self.total = 0
                return code, lines
            if self.total >= self.reply_limit:
                return self.fail("long")
        return None


cdef Py_ssize_t write_stuffed(octets_t p, Py_ssize_t n, bint line_start, unsigned char* q) noexcept nogil:
    """Counts the dots to be added; where ``q`` is not NULL it also writes what comes out."""
    cdef uint64_t crlf, found
    cdef uint64_t carry = 0
    cdef uint64_t start = line_start
    cdef Block block
    cdef int k
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t dots = 0
    cdef Py_ssize_t m, done
    cdef unsigned char pad[64]
    cdef octets_t b
    while i < n:
        m = n - i
        b = p + i
        if m >= 64:
            m = 64
        else:
            memset(pad, c"x", 64)
            memcpy(pad, b, m)
            b = pad
        look(b, &block)
        crlf = block.lf & (block.cr << 1 | carry)
        found = (crlf << 1 | start) & block.dot
        if q != NULL:
            done = 0
            while found:
                k = first_bit(found)
                memcpy(q, b + done, k - done)
                q += k - done
                q[0] = c"."
                q += 1
                done = k
                found &= found - 1
            memcpy(q, b + done, m - done)
            q += m - done
        else:
            dots += count_bits(found)
        carry = block.cr >> 63
        start = crlf >> 63
        i += m
    return dots


def stuff(bytes content not None, bint line_start = True):
    cdef octets_t p = <octets_t>PyBytes_AS_STRING(content)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(content)
    cdef Py_ssize_t dots = write_stuffed(p, n, line_start, NULL)
    cdef bytes made
    if dots == 0:
        return content
    made = PyBytes_FromStringAndSize(NULL, n + dots)
    write_stuffed(p, n, line_start, <unsigned char*>PyBytes_AS_STRING(made))
    return made


# --- checksums ----------------------------------------------------------------------------

cdef bint FOLDS = can_fold()
choose_walk()

cdef enum:
    FOLD_FROM = 128            # octets; zlib is as fast below
    FOLD_HELD = 256 * 1024     # octets that are summed without letting go of the GIL: 15 µs


def crc32(bytes content not None, uint32_t value = 0):
    cdef octets_t p = <octets_t>PyBytes_AS_STRING(content)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(content), whole = n & ~15
    if not FOLDS or n < FOLD_FROM:
        return _crc32(content, value)
    if n <= FOLD_HELD:
        value = ~fold(p, whole, ~value)
    else:
        with nogil:
            value = ~fold(p, whole, ~value)
    return value if whole == n else _crc32(content[whole:], value)
