/* libFuzzer's entry: Python inside, the parser compiled in with sanitizers and edge counters.

   A target is a module of tests.fuzz (FUZZ_TARGET names it). Every input goes through its
   `probe`, which is quick; those that reached something new, and one in FUZZ_ORACLE of the
   others, go through its `check`, which asks the oracle. An exception out of either ends the
   process the way a crash does: libFuzzer keeps the input.

   Edges are counted twice over: libFuzzer's own, in the C of the parser, and those of the rules
   in Python, which tests/fuzz/edges.py marks with calls of `__edge__`. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

PyMODINIT_FUNC PyInit__parser(void);

#define MARKS 16384
/* libFuzzer takes this section for further counters of coverage, and clears it before every input. */
__attribute__((section("__libfuzzer_extra_counters"), used)) static uint8_t marks[MARKS];
/* The counters that the compiler put into the parser. */
extern uint8_t __start___sancov_cntrs[], __stop___sancov_cntrs[];

static uint8_t marks_seen[MARKS], marks_kept[MARKS];
static uint8_t *edges_seen, *edges_kept;
static size_t edges, marks_made;
static unsigned long long executions, asked, every;
static PyObject *probe, *check;
static struct timespec begun;

static PyObject *edge(PyObject *self, PyObject *number)
{
    const long which = PyLong_AsLong(number);
    if (which >= 0 && which < MARKS && marks[which] != 255)
        marks[which]++;
    Py_RETURN_NONE;
}

static PyMethodDef edge_method = {"__edge__", edge, METH_O, "Counts one passage."};

static size_t passed(const uint8_t *seen, size_t count)
{
    size_t i, found = 0;
    for (i = 0; i < count; i++)
        found += seen[i] != 0;
    return found;
}

static void report(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    fprintf(stderr, "fuzz: executions=%llu oracle=%llu c_edges=%zu/%zu python_edges=%zu/%zu seconds=%.1f\n", executions, asked,
            passed(edges_seen, edges), edges, passed(marks_seen, marks_made), marks_made,
            (double)(now.tv_sec - begun.tv_sec) + (double)(now.tv_nsec - begun.tv_nsec) / 1e9);
}

static void fail(const char *what)
{
    fflush(stdout);
    if (PyErr_Occurred())
        PyErr_Print();
    fprintf(stderr, "fuzz: %s\n", what);
    if (edges_seen != NULL)
        report();
    fflush(stderr);
    abort();
}

static PyObject *need(PyObject *object, const char *what)
{
    if (object == NULL)
        fail(what);
    return object;
}

static const char *environment(const char *name)
{
    const char *value = getenv(name);
    if (value == NULL) {
        fprintf(stderr, "fuzz: %s is not set; tests/fuzz/__main__.py starts this\n", name);
        exit(2);
    }
    return value;
}

/* As libFuzzer sees counts: how often in powers of two. */
static uint8_t bucket(uint8_t count)
{
    return count >= 128 ? 128 : count >= 32 ? 64 : count >= 16 ? 32 : count >= 8 ? 16 : count >= 4 ? 8 : count >= 3 ? 4 : count >= 2 ? 2 : count;
}

static int note(const uint8_t *counters, uint8_t *seen, size_t count)
{
    int fresh = 0;
    size_t i;
    uint64_t word;
    for (i = 0; i < count; i++) {
        if (i % 8 == 0 && i + 8 <= count) {
            memcpy(&word, counters + i, 8);
            if (word == 0) {
                i += 7;
                continue;
            }
        }
        if (bucket(counters[i]) & ~seen[i]) {
            seen[i] |= bucket(counters[i]);
            fresh = 1;
        }
    }
    return fresh;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    PyConfig config;
    PyStatus status;
    PyObject *builtins, *module, *made;
    char name[64];

    if (PyImport_AppendInittab("gateway._parser", PyInit__parser) < 0)
        fail("the parser cannot be built in");
    PyConfig_InitPythonConfig(&config);
    config.install_signal_handlers = 0;
    config.write_bytecode = 0;
    config.use_hash_seed = 1;
    config.hash_seed = 0;
    status = PyConfig_SetBytesString(&config, &config.executable, environment("FUZZ_PYTHON"));
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
    PyConfig_Clear(&config);

    builtins = need(PyImport_ImportModule("builtins"), "no builtins");
    if (PyObject_SetAttrString(builtins, "__edge__", need(PyCFunction_New(&edge_method, NULL), "no counter")) < 0)
        fail("no counter");
    module = need(PyImport_ImportModule("tests.fuzz.edges"), "tests.fuzz.edges");
    Py_XDECREF(need(PyObject_CallMethod(module, "install", NULL), "the marks"));
    snprintf(name, sizeof name, "tests.fuzz.%s", environment("FUZZ_TARGET"));
    made = need(PyImport_ImportModule(name), name);
    probe = need(PyObject_GetAttrString(made, "probe"), "the target has no probe");
    check = need(PyObject_GetAttrString(made, "check"), "the target has no check");
    made = need(PyObject_CallMethod(module, "made", NULL), "the marks");
    marks_made = PyLong_AsSize_t(made);
    if (marks_made > MARKS)
        fail("more marks than counters");
    every = strtoull(environment("FUZZ_ORACLE"), NULL, 10);
    edges = (size_t)(__stop___sancov_cntrs - __start___sancov_cntrs);
    edges_seen = calloc(edges + 1, 1);
    edges_kept = malloc(edges + 1);
    if (edges_seen == NULL || edges_kept == NULL)
        fail("no memory");
    clock_gettime(CLOCK_MONOTONIC, &begun);
    atexit(report);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    PyObject *octets = need(PyBytes_FromStringAndSize((const char *)data, (Py_ssize_t)size), "no memory");
    int fresh;
    executions++;
    Py_DECREF(need(PyObject_CallOneArg(probe, octets), "an input that fails by itself"));
    fresh = note(__start___sancov_cntrs, edges_seen, edges) | note(marks, marks_seen, marks_made);
    if (fresh || every <= 1 || executions % every == 0) {
        /* Whether the oracle was asked must not look like other behaviour. */
        memcpy(edges_kept, __start___sancov_cntrs, edges);
        memcpy(marks_kept, marks, marks_made);
        asked++;
        Py_DECREF(need(PyObject_CallOneArg(check, octets), "an input on which the oracle disagrees"));
        memcpy(__start___sancov_cntrs, edges_kept, edges);
        memcpy(marks, marks_kept, marks_made);
    }
    Py_DECREF(octets);
    return 0;
}
