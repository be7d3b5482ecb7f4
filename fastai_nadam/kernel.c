/* The update of the NAdam family, in one pass over memory. nbs/02_multi_tensor.ipynb explains it.

   For each element of a parameter p with gradient g, with the two numbers a and b of a rule:

       m ← mom·m + (1−mom)·g
       v ← sqr_mom·v + (1−sqr_mom)·g²
       p ← (1−lr·wd)·p − lr·(a·m + b·g) / (√(v/debias2) + eps)

   Where a tensor lies in memory, PyTorch says through a public standard, DLPack's exchange API. So this file needs no
   header of PyTorch, and a new PyTorch no new build. */

#define Py_LIMITED_API 0x030A0000 /* one binary for every Python from 3.10 on */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>

/* Have the compiler write a function three times, for the processors there are; the right one is taken when it runs */
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(NO_CLONES)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

#ifdef _OPENMP
#define OPENMP 1 /* threads */
#else
#define OPENMP 0
#endif
enum { BLOCK = 1 << 16, LINE = 16 }; /* elements that a thread takes at a time; and in 64 bytes, where we cut */

typedef struct { double lr, mom, sqr_mom, eps, wd, l2, a, b, debias2; } Numbers;

/* The update of n elements, once for float and once for double. L2 decay goes into the gradient first.
   `__restrict` promises that the four arrays do not overlap, so that the compiler may take many elements at a time. */
#define UPDATE(name, real, root)                                                                                     \
    CLONES static void name(void *ps, void *gs, void *ms, void *vs, size_t n, const Numbers *s) {                    \
        real *__restrict p = ps, *__restrict g = gs, *__restrict m = ms, *__restrict v = vs;                         \
        const real lr = s->lr, mom = s->mom, sqr_mom = s->sqr_mom, eps = s->eps, l2 = s->l2, a = s->a, b = s->b;     \
        const real new_m = 1 - s->mom, new_v = 1 - s->sqr_mom, keep = 1 - s->lr*s->wd, scale = 1/s->debias2;         \
        if (l2 != 0) for (size_t i = 0; i < n; i++) g[i] += l2*p[i];                                                 \
        for (size_t i = 0; i < n; i++) {                                                                             \
            m[i] = mom*m[i] + new_m*g[i];                                                                            \
            v[i] = sqr_mom*v[i] + new_v*g[i]*g[i];                                                                   \
            p[i] = keep*p[i] - lr*(a*m[i] + b*g[i]) / (root(v[i]*scale) + eps);                                      \
        }                                                                                                            \
    }
UPDATE(update_float, float, sqrtf)
UPDATE(update_double, double, sqrt)

/* One parameter: the addresses of its four arrays, and how many elements they have */
typedef struct { uint64_t p, g, m, v, n; } Row;

/* All elements of all parameters, one after the other, are cut into blocks. Where in a row of n elements, of which the
   first has number `start`, does block k begin? */
static uint64_t cut(uint64_t n, uint64_t start, uint64_t k) {
    uint64_t at = k*BLOCK > start ? (k*BLOCK - start + LINE-1) / LINE * LINE : 0;
    return at < n ? at : n;
}

/* Update block k: the end of one tensor, a piece of a long one, or many short ones.
   Rows 0 to i have `ends[i]` elements. */
static void update_block(const Row *rows, const uint64_t *ends, size_t n, uint64_t k, int is_double, const Numbers *s) {
    size_t lo = 0, hi = n; /* look for the first row that ends after the block begins */
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (ends[mid] > k*BLOCK) hi = mid; else lo = mid + 1;
    }
    for (; lo < n; lo++) {
        const Row *r = rows + lo;
        uint64_t start = ends[lo] - r->n, size = is_double ? 8 : 4;
        if (start >= (k+1)*BLOCK) return;
        uint64_t from = cut(r->n, start, k), at = from*size;
        (is_double ? update_double : update_float)((void *)(uintptr_t)(r->p + at), (void *)(uintptr_t)(r->g + at),
            (void *)(uintptr_t)(r->m + at), (void *)(uintptr_t)(r->v + at), cut(r->n, start, k+1) - from, s);
    }
}

/* Write the numbers of a step into the state of a parameter */
static int write_numbers(PyObject *state, PyObject *new) {
    if (PyDict_CheckExact(state)) return PyDict_Update(state, new);
    PyObject *res = PyObject_CallMethod(state, "update", "O", new);
    Py_XDECREF(res);
    return res ? 0 : -1;
}

/* Step the rows, and write the new numbers into their states. Until this returns, Python handles no Ctrl-C and runs
   nothing else in this thread, so averages and numbers change together.
   A thread of OpenMP takes the next block as soon as it is free. */
static PyObject *step(PyObject *module, PyObject *args) {
    const char *bytes; Py_ssize_t len, i; PyObject *states, *new; int is_double, threads; Numbers s;
    if (!PyArg_ParseTuple(args, "y#O!O!pi" "ddddd" "dddd",
        &bytes, &len, &PyList_Type, &states, &PyDict_Type, &new, &is_double, &threads,
        &s.lr, &s.mom, &s.sqr_mom, &s.eps, &s.wd, &s.l2, &s.a, &s.b, &s.debias2)) return NULL;
    const Row *rows = (const Row *)bytes;
    size_t n = len / sizeof(Row), j;
    uint64_t *ends = PyMem_Malloc((n+1) * sizeof(uint64_t)), end = 0;
    if (!ends) return PyErr_NoMemory();
    for (j = 0; j < n; j++) ends[j] = end += rows[j].n;
    int blocks = (int)((end + BLOCK-1) / BLOCK), k;
    Py_BEGIN_ALLOW_THREADS /* other threads of Python may run meanwhile */
#if OPENMP
    #pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && blocks > 1)
#endif
    for (k = 0; k < blocks; k++) update_block(rows, ends, n, k, is_double, &s);
    Py_END_ALLOW_THREADS
    PyMem_Free(ends);
    for (i = 0; i < PyList_Size(states); i++) if (write_numbers(PyList_GetItem(states, i), new)) return NULL;
    Py_RETURN_NONE;
}

/* DLPack's exchange API, as version 1 of its header dlpack.h has it: a table of functions. PyTorch has it from 2.10 on.
   `view` tells where a tensor is, and how it lies there. */
typedef struct {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits; uint16_t lanes; /* of the dtype */
    int64_t *shape, *strides;
    uint64_t byte_offset;
} Tensor;
typedef struct {
    uint32_t major, minor; void *older;
    void *allocate, *from_python, *to_python;
    int (*view)(void *object, Tensor *out);
    void *stream;
} Exchange;
enum { CPU = 1, CUDA = 2, ROCM = 10, FLOAT = 2, BFLOAT = 4 };

/* The exchange API in a capsule of Python, or NULL where it is one that this file does not know */
static const Exchange *exchange(PyObject *capsule) {
    const Exchange *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!api || api->major != 1 || !api->view) { PyErr_Clear(); return NULL; }
    return api;
}

/* Do we know what to do with this kind of tensor? */
static int known(const Tensor *t) {
    return (t->device_type == CPU || t->device_type == CUDA || t->device_type == ROCM) &&
        (t->code == FLOAT || t->code == BFLOAT) && t->bits >= 8 && t->lanes == 1;
}

static int same_kind(const Tensor *t, const Tensor *u) {
    return t->device_type == u->device_type && t->device_id == u->device_id && t->code == u->code && t->bits == u->bits;
}

/* The number of elements of a tensor; -1 if it has gaps, or if two of its elements are one */
static int64_t dense(const Tensor *t) {
    int64_t n = 1, next = 1;
    int32_t i, found = 0, dims = 0;
    for (i = 0; i < t->ndim; i++) { n *= t->shape[i]; dims += t->shape[i] != 1; }
    if (!n) return 0;
    for (i = 0; i < t->ndim; i++) /* the next dimension begins again behind the elements of those before */
        if (t->shape[i] != 1 && t->strides[i] == next) { next *= t->shape[i]; found++; i = -1; }
    return found == dims ? n : -1;
}

/* Can two tensors be walked through side by side? */
static int alike(const Tensor *t, const Tensor *u) {
    if (!same_kind(t, u) || t->ndim != u->ndim) return 0;
    for (int32_t i = 0; i < t->ndim; i++)
        if (t->shape[i] != u->shape[i] || (t->shape[i] != 1 && t->strides[i] != u->strides[i])) return 0;
    return 1;
}

/* Rows of parameters, gradients and averages, which come in one list after another, as bytes. None if a tensor is out
   of the ordinary: not like the other three of its row, with gaps, of another dtype or device than the first, or not
   inside its storage, of which we get address and size. */
static PyObject *rows(PyObject *module, PyObject *args) {
    PyObject *capsule, *tensors, *starts, *sizes, *res;
    if (!PyArg_ParseTuple(args, "OO!O!O!",
        &capsule, &PyList_Type, &tensors, &PyList_Type, &starts, &PyList_Type, &sizes)) return NULL;
    const Exchange *api = exchange(capsule);
    Py_ssize_t n = PyList_Size(tensors) / 4, j, k;
    if (!api || PyList_Size(starts) < 4*n || PyList_Size(sizes) < 4*n) Py_RETURN_NONE;
    if (!(res = PyBytes_FromStringAndSize(NULL, n * sizeof(Row)))) return NULL;
    uint64_t *out = (uint64_t *)PyBytes_AsString(res);
    Tensor first = {0}, p = {0}, t = {0};
    for (j = 0; j < n; j++) {
        int64_t len = 0;
        for (k = 0; k < 4; k++) {
            if (api->view(PyList_GetItem(tensors, k*n + j), &t)) goto out_of_the_ordinary;
            if (!k) {
                p = t;
                if (!j) first = t;
                if (!known(&p) || !same_kind(&p, &first) || (len = dense(&p)) < 0) goto out_of_the_ordinary;
            } else if (!alike(&p, &t)) goto out_of_the_ordinary;
            uint64_t at = (uint64_t)(uintptr_t)t.data + t.byte_offset, bytes = t.bits/8;
            uint64_t start = PyLong_AsUnsignedLongLong(PyList_GetItem(starts, k*n + j));
            uint64_t size = PyLong_AsUnsignedLongLong(PyList_GetItem(sizes, k*n + j));
            if (PyErr_Occurred()) goto out_of_the_ordinary;
            if (len && (!at || at % bytes || at < start || at - start > size || len*bytes > size - (at - start)))
                goto out_of_the_ordinary;
            *out++ = at;
        }
        *out++ = len;
    }
    return res;
out_of_the_ordinary:
    PyErr_Clear();
    Py_DECREF(res);
    Py_RETURN_NONE;
}

/* What Python has to know about this module: its name, and its functions */
static PyMethodDef methods[] = {
    {"rows", rows, METH_VARARGS, "rows(exchange_api, tensors, starts, sizes)"},
    {"step", step, METH_VARARGS,
        "step(rows, states, new, is_double, threads, lr, mom, sqr_mom, eps, wd, l2, a, b, debias2)"},
    {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernel", NULL, -1, methods};

PyMODINIT_FUNC PyInit__kernel(void) {
    PyObject *m = PyModule_Create(&module);
    if (m) PyModule_AddIntConstant(m, "openmp", OPENMP);
    return m;
}
