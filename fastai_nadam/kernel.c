/* The update of the NAdam family, in one pass over memory. nbs/02_multi_tensor.ipynb explains it.

   For each element of a parameter p with gradient g, with the two numbers a and b of a rule:

       m ← mom·m + (1−mom)·g
       v ← sqr_mom·v + (1−sqr_mom)·g²
       p ← (1−lr·wd)·p − lr·(a·m + b·g) / (√(v/debias2) + eps)

   Python hands over where the numbers lie in memory and how many there are, so this file knows nothing of PyTorch. */

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

/* One parameter: the addresses of its four arrays, and the number of elements in it and in all that stand before it */
typedef struct { uint64_t p, g, m, v, end; } Row;

/* All elements of all parameters, one after the other, are cut into blocks. Where in row r does block k begin? */
static uint64_t cut(const Row *r, uint64_t start, uint64_t k) {
    uint64_t at = k*BLOCK > start ? (k*BLOCK - start + LINE-1) / LINE * LINE : 0;
    return at < r->end - start ? at : r->end - start;
}

/* Update block k: the end of one tensor, a piece of a long one, or many short ones */
static void update_block(const Row *rows, size_t n, uint64_t k, int is_double, const Numbers *s) {
    size_t lo = 0, hi = n; /* look for the first row that ends after the block begins */
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (rows[mid].end > k*BLOCK) hi = mid; else lo = mid + 1;
    }
    for (; lo < n; lo++) {
        const Row *r = rows + lo;
        uint64_t start = lo ? r[-1].end : 0, from = cut(r, start, k), size = is_double ? 8 : 4, at = from*size;
        if (start >= (k+1)*BLOCK) return;
        (is_double ? update_double : update_float)((void *)(uintptr_t)(r->p + at), (void *)(uintptr_t)(r->g + at),
            (void *)(uintptr_t)(r->m + at), (void *)(uintptr_t)(r->v + at), cut(r, start, k+1) - from, s);
    }
}

/* What Python calls. A thread of OpenMP takes the next block as soon as it is free. */
static PyObject *step(PyObject *module, PyObject *args) {
    const char *bytes; Py_ssize_t len; int is_double, threads; Numbers s;
    if (!PyArg_ParseTuple(args, "y#pi" "ddddd" "dddd", &bytes, &len, &is_double, &threads,
        &s.lr, &s.mom, &s.sqr_mom, &s.eps, &s.wd, &s.l2, &s.a, &s.b, &s.debias2)) return NULL;
    const Row *rows = (const Row *)bytes;
    size_t n = len / sizeof(Row);
    int blocks = n ? (int)((rows[n-1].end + BLOCK-1) / BLOCK) : 0, k;
    Py_BEGIN_ALLOW_THREADS /* other threads of Python may run meanwhile */
#if OPENMP
    #pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && blocks > 1)
#endif
    for (k = 0; k < blocks; k++) update_block(rows, n, k, is_double, &s);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* What Python has to know about this module: its name, and that it has one function */
static const char doc[] = "step(rows, is_double, threads, lr, mom, sqr_mom, eps, wd, l2, a, b, debias2)";
static PyMethodDef methods[] = {{"step", step, METH_VARARGS, doc}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernel", NULL, -1, methods};

PyMODINIT_FUNC PyInit__kernel(void) {
    PyObject *m = PyModule_Create(&module);
    if (m) PyModule_AddIntConstant(m, "openmp", OPENMP);
    return m;
}
