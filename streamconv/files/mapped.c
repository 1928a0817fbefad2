/* Windows on mapped files that do not end the process if a file is truncated.
 *
 * If another program truncates a mapped file, reading the pages beyond its new end raises SIGBUS. The handler here maps
 * zeros in their place and marks the window as lost. The code that reads them continues to its end, whatever locks it
 * holds; the caller then checks the window and discards the result. A fault at any other address is passed on to the
 * previous handler.
 */
#define Py_LIMITED_API 0x030B0000 /* 3.11, the first with the buffer protocol */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if !defined(__linux__)
#error "mapped reads are for Linux only; on other systems files are read at offsets"
#endif

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

/* Addresses and lengths of windows are multiples of the largest folio that the page cache maps at a time, a huge page:
   it is then mapped by a single page table entry, and unmapped as a whole. */
enum { FOLIO_NBYTES = 1 << 21, MAX_WINDOWS = 256 };

typedef struct {
    _Atomic uintptr_t first, end; /* the addresses of a window; 0 if the slot is free */
    _Atomic int lost;
} slot_t;

static slot_t slots[MAX_WINDOWS];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* for the variables below; the handler takes no lock */
static size_t n_windows, page_nbytes;
static struct sigaction before;
static _Thread_local volatile sig_atomic_t is_passing;

/* ------------------------------------------------------------------------------------------------ the handler */

static int replace(uintptr_t address) {
    for (size_t i = 0; i < MAX_WINDOWS; i++) {
        uintptr_t first = atomic_load(&slots[i].first), end = atomic_load(&slots[i].end);
        if (first == 0 || address < first || address >= end) continue;
        uintptr_t page = address & ~(uintptr_t)(page_nbytes - 1);
        void *zeros = mmap((void *)page, end - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        atomic_store(&slots[i].lost, 1);
        return zeros != MAP_FAILED;
    }
    return 0;
}

static void on_bus(int number, siginfo_t *info, void *context) {
    int saved = errno;
    if (replace((uintptr_t)info->si_addr)) {
        errno = saved;
        return;
    }
    if (is_passing || (!(before.sa_flags & SA_SIGINFO) &&
                       (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN))) {
        signal(number, SIG_DFL); /* the same access faults again and ends the process, as without this handler */
        return;
    }
    is_passing = 1; /* a handler that was installed after this one may pass the fault back */
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(number, info, context);
    else
        before.sa_handler(number);
    is_passing = 0;
}

static int is_ours(const struct sigaction *action) {
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_bus;
}

/* Called with the mutex held. The handler is installed while there are windows. */
static int install(void) {
    struct sigaction now, ours;
    if (sigaction(SIGBUS, NULL, &now) != 0) return -1;
    if (is_ours(&now)) return 0;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_bus;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    before = now;
    return sigaction(SIGBUS, &ours, NULL);
}

static void uninstall(void) {
    struct sigaction now;
    if (sigaction(SIGBUS, NULL, &now) == 0 && is_ours(&now)) sigaction(SIGBUS, &before, NULL);
}

/* A slot for a window at these addresses; -1, with errno, if there is none. */
static int enter(uintptr_t first, uintptr_t end) {
    int found = -1;
    pthread_mutex_lock(&mutex);
    if (n_windows == 0 && install() != 0) {
        pthread_mutex_unlock(&mutex);
        return -1;
    }
    for (int i = 0; i < MAX_WINDOWS && found < 0; i++)
        if (atomic_load(&slots[i].first) == 0) found = i;
    if (found >= 0) {
        n_windows++;
        atomic_store(&slots[found].lost, 0);
        atomic_store(&slots[found].end, end);
        atomic_store(&slots[found].first, first);
    } else {
        errno = EAGAIN;
    }
    pthread_mutex_unlock(&mutex);
    return found;
}

static void leave(int slot) {
    pthread_mutex_lock(&mutex);
    atomic_store(&slots[slot].first, 0);
    if (--n_windows == 0) uninstall();
    pthread_mutex_unlock(&mutex);
}

/* ------------------------------------------------------------------------------------------------ windows */

typedef struct {
    PyObject_HEAD
    char *start;
    size_t mapped_nbytes;
    Py_ssize_t nbytes;
    int slot;
} window_t;

/* Returns 0, or an errno if the window could not be mapped. */
static int map(window_t *self, int fd, long long offset) {
    self->mapped_nbytes = ((size_t)self->nbytes + FOLIO_NBYTES - 1) & ~(size_t)(FOLIO_NBYTES - 1);
    self->start = mmap(NULL, self->mapped_nbytes, PROT_READ, MAP_SHARED, fd, offset);
    if (self->start == MAP_FAILED) {
        self->start = NULL;
        return errno;
    }
    self->slot = enter((uintptr_t)self->start, (uintptr_t)self->start + self->mapped_nbytes);
    if (self->slot >= 0) {
        madvise(self->start, self->mapped_nbytes, MADV_SEQUENTIAL); /* read ahead from a disk as for positioned reads */
        return 0;
    }
    int error = errno;
    munmap(self->start, self->mapped_nbytes);
    self->start = NULL;
    return error;
}

static PyObject *window_populate(PyObject *object, PyObject *args) {
    window_t *self = (window_t *)object;
    Py_ssize_t start, nbytes;
    int result;
    if (!PyArg_ParseTuple(args, "nn:populate", &start, &nbytes)) return NULL;
    if (start < 0 || nbytes <= 0 || start > self->nbytes - nbytes) {
        PyErr_Format(PyExc_ValueError, "the window has %zd bytes, not %zd at %zd", self->nbytes, nbytes, start);
        return NULL;
    }
    size_t first = (size_t)start & ~(page_nbytes - 1);
    size_t end = ((size_t)start + (size_t)nbytes + page_nbytes - 1) & ~(page_nbytes - 1);
    Py_BEGIN_ALLOW_THREADS
    result = madvise(self->start + first, end - first, MADV_POPULATE_READ);
    Py_END_ALLOW_THREADS
    return result == 0 ? Py_NewRef(Py_None) : PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *window_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    int fd, error;
    long long offset;
    Py_ssize_t nbytes;
    (void)keywords;
    if (!PyArg_ParseTuple(args, "iLn:Window", &fd, &offset, &nbytes)) return NULL;
    if (nbytes <= 0 || offset < 0 || offset % FOLIO_NBYTES != 0) {
        PyErr_Format(PyExc_ValueError, "no window has %zd bytes at %lld", nbytes, offset);
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    window_t *self = (window_t *)allocate(type, 0);
    if (self == NULL) return NULL;
    self->nbytes = nbytes;
    self->slot = -1;
    Py_BEGIN_ALLOW_THREADS
    error = map(self, fd, offset);
    Py_END_ALLOW_THREADS
    if (error == 0) return (PyObject *)self;
    Py_DECREF(self);
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static void window_dealloc(PyObject *object) {
    window_t *self = (window_t *)object;
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    if (self->start != NULL) {
        Py_BEGIN_ALLOW_THREADS
        leave(self->slot); /* before munmap, after which another window can get these addresses */
        munmap(self->start, self->mapped_nbytes);
        Py_END_ALLOW_THREADS
    }
    release(object);
    Py_DECREF(type);
}

static int window_getbuffer(PyObject *object, Py_buffer *view, int flags) {
    window_t *self = (window_t *)object;
    return PyBuffer_FillInfo(view, object, self->start, self->nbytes, 1, flags);
}

static PyObject *window_is_lost(PyObject *object, void *closure) {
    (void)closure;
    return PyBool_FromLong(atomic_load(&slots[((window_t *)object)->slot].lost));
}

static PyGetSetDef WINDOW_GETSET[] = {
    {"is_lost", window_is_lost, NULL, "Whether bytes were read that the file no longer has; they were zeros.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef WINDOW_METHODS[] = {
    {"populate", window_populate, METH_VARARGS,
     "populate(start, nbytes, /)\n--\n\nMap these pages now, in one call. OSError if some of them do not exist."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot WINDOW_SLOTS[] = {
    {Py_tp_doc,
     "Window(fd, offset, nbytes, /)\n--\n\nA read-only buffer of a file's bytes from a multiple of 2 MiB on, mapped until\n"
     "nothing refers to it. OSError if the system does not map it."},
    {Py_tp_new, window_new},
    {Py_tp_dealloc, window_dealloc},
    {Py_tp_getset, WINDOW_GETSET},
    {Py_tp_methods, WINDOW_METHODS},
    {Py_bf_getbuffer, window_getbuffer},
    {0, NULL},
};

static PyType_Spec WINDOW_SPEC = {
    .name = "streamconv.files._mapped.Window",
    .basicsize = sizeof(window_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = WINDOW_SLOTS,
};

static PyObject *filesystem(PyObject *module, PyObject *args) {
    int fd;
    struct statfs status;
    (void)module;
    if (!PyArg_ParseTuple(args, "i:filesystem", &fd)) return NULL;
    if (fstatfs(fd, &status) != 0) return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromUnsignedLong((unsigned long)status.f_type & 0xffffffffUL);
}

static int fill_module(PyObject *module) {
    page_nbytes = (size_t)sysconf(_SC_PAGESIZE);
    PyObject *type = PyType_FromSpec(&WINDOW_SPEC);
    if (type == NULL) return -1;
    int result = PyModule_AddObjectRef(module, "Window", type);
    Py_DECREF(type);
    return result;
}

static PyMethodDef METHODS[] = {
    {"filesystem", filesystem, METH_VARARGS, "filesystem(fd, /)\n--\n\nThe number of the filesystem's kind (statfs(2))."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot MODULE_SLOTS[] = {{Py_mod_exec, fill_module}, {0, NULL}};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "streamconv.files._mapped",
    .m_doc = "Windows on mapped files, for streamconv.files.window.",
    .m_methods = METHODS,
    .m_slots = MODULE_SLOTS,
};

PyMODINIT_FUNC PyInit__mapped(void) { return PyModuleDef_Init(&MODULE); }
