/*
 * The Python module argo_streams: a stage as an iterator of records.
 *
 * Records are received in batches and finished in batches; a batch is as long as what 1 ms of work was before, so that a slow
 * program still finishes each record by itself. A record is finished when the loop asks for the next one.
 *
 * Who holds bytes: a Record exports its payload and counts its exports. When it is finished, its memoryview is released (a later
 * use is a ValueError); if something else still looks at the bytes, a slice of the view for instance, that is a BufferError, and
 * the record is not finished. So no Python object can look at memory that is somebody else's again.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <argo_streams.h>
#include <time.h>

/* More is not faster, and a kill repeats less. */
#define BATCH_RECORDS_MAX 256
/* Far from what fills the shortest ring (256 KiB), so that the outputs of one more record have room. */
#define PENDING_BYTES_MAX (32 * 1024)
/* A batch that took longer is followed by a shorter one. */
#define BATCH_NS_MAX 1000000
/* How long a signal may wait for its Python handler. */
#define SIGNAL_LOOK_NS 500000000

typedef struct {
    PyObject_HEAD
    const ags_record *record; /* NULL: it is finished */
    const char *base;
    PyObject *view; /* the memoryview that was handed out */
    Py_ssize_t exports;
} Record;

typedef struct {
    PyObject_HEAD
    ags_stage *stage; /* NULL: closed */
    ags_record records[BATCH_RECORDS_MAX];
    Record *slots[BATCH_RECORDS_MAX];
    uint32_t batch_max, count, next, finished;
    uint64_t pending_bytes, begin_ns;
    const char **bases;
    uint32_t *generations;
    uint32_t bases_len;
    int has_current, is_touched, is_over, is_busy;
    void *attributes;
    size_t attributes_size;
} Stage;

static PyObject *Error, *Interrupted, *empty;
static PyTypeObject RecordType, StageType, ItemsType;

static PyObject *fail(ags_status status)
{
    const char *sentence = ags_last_error();
    int plain = ags_status_class(status) == AGS_CLASS_TRY_AGAIN || sentence[0] == 0;
    PyObject *text = PyUnicode_FromFormat("%s: %s", ags_status_name(status), plain ? ags_status_text(status) : sentence);
    PyObject *kind = status == AGS_INTERRUPTED ? Interrupted : Error;
    PyObject *error = text ? PyObject_CallOneArg(kind, text) : NULL;
    PyObject *number = error ? PyLong_FromLong(status) : NULL;
    if (number && PyObject_SetAttrString(error, "status", number) == 0)
        PyErr_SetObject(kind, error);
    Py_XDECREF(text);
    Py_XDECREF(error);
    Py_XDECREF(number);
    return NULL;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- Record ---- */

static int record_alive(Record *self)
{
    if (self->record)
        return 1;
    PyErr_SetString(PyExc_ValueError, "the record is finished: copy what is needed longer, with bytes()");
    return 0;
}

static int record_getbuffer(Record *self, Py_buffer *buffer, int flags)
{
    if (!record_alive(self)) {
        buffer->obj = NULL;
        return -1;
    }
    const char *data = self->record->len_bytes ? self->base + self->record->offset : "";
    if (PyBuffer_FillInfo(buffer, (PyObject *)self, (void *)data, (Py_ssize_t)self->record->len_bytes, 1, flags) < 0)
        return -1;
    self->exports++;
    return 0;
}

static void record_releasebuffer(Record *self, Py_buffer *buffer)
{
    self->exports--;
}

static PyObject *record_payload(Record *self, void *unused)
{
    if (!self->view) {
        self->view = PyMemoryView_FromObject((PyObject *)self);
        if (!self->view)
            return NULL;
    }
    return Py_NewRef(self->view);
}

static PyObject *record_key(Record *self, void *unused)
{
    if (!record_alive(self))
        return NULL;
    if (!(self->record->flags & AGS_RECORD_KEYED))
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(self->record->key_len_bytes ? self->base + self->record->key_offset : "", (Py_ssize_t)self->record->key_len_bytes);
}

static PyObject *record_event_time(Record *self, void *unused)
{
    return record_alive(self) ? PyLong_FromLongLong(self->record->event_time_ns) : NULL;
}

static PyObject *record_input(Record *self, void *unused)
{
    return record_alive(self) ? PyLong_FromUnsignedLong(self->record->input) : NULL;
}

static PyObject *record_attempts(Record *self, void *unused)
{
    return record_alive(self) ? PyLong_FromUnsignedLong(self->record->attempts) : NULL;
}

static PyObject *record_position(Record *self, void *unused)
{
    return record_alive(self) ? PyLong_FromUnsignedLongLong(self->record->position) : NULL;
}

static PyObject *record_attribute(Record *self, PyObject *name)
{
    if (!record_alive(self))
        return NULL;
    Py_ssize_t len;
    const char *text = PyUnicode_AsUTF8AndSize(name, &len);
    if (!text)
        return NULL;
    ags_bytes list = { self->record->attributes_len_bytes ? self->base + self->record->attributes_offset : NULL, self->record->attributes_len_bytes };
    ags_bytes value, wanted = { text, (uint64_t)len };
    ags_status status = ags_attributes_find(list, wanted, &value);
    if (status != AGS_OK)
        return fail(status);
    if (!value.data)
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(value.data, (Py_ssize_t)value.len_bytes);
}

static Py_ssize_t record_length(Record *self)
{
    return record_alive(self) ? (Py_ssize_t)self->record->len_bytes : -1;
}

static void record_dealloc(Record *self)
{
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* Takes the bytes back from Python. 0: something still looks at them. */
static int record_finish(Record *self)
{
    if (self->view) {
        if (Py_REFCNT(self->view) > 1) {
            PyObject *released = PyObject_CallMethod(self->view, "release", NULL);
            if (!released)
                PyErr_Clear();
            Py_XDECREF(released);
        } else {
            Py_CLEAR(self->view);
        }
    }
    if (self->exports > 0) {
        PyErr_SetString(PyExc_BufferError,
            "a slice or another view of a record's payload is still held when the record is finished: copy it with bytes(), or del it before the next record");
        return 0;
    }
    Py_CLEAR(self->view);
    self->record = NULL;
    return 1;
}

static PyGetSetDef record_getset[] = {
    { "payload", (getter)record_payload, NULL, "The payload as a memoryview of the shared memory, good until the next record is asked for.", NULL },
    { "key", (getter)record_key, NULL, "The key as bytes, None without one.", NULL },
    { "event_time_ns", (getter)record_event_time, NULL, "When it happened, ns since 1970.", NULL },
    { "input", (getter)record_input, NULL, "Number of the input that it came from.", NULL },
    { "attempts", (getter)record_attempts, NULL, "How often it failed before, see Stage.fail.", NULL },
    { "position", (getter)record_position, NULL, "Its place in its input; grows from record to record, also over restarts.", NULL },
    { NULL },
};
static PyMethodDef record_methods[] = {
    { "attribute", (PyCFunction)record_attribute, METH_O, "attribute(name) -> bytes or None" },
    { NULL },
};
static PyBufferProcs record_buffer = { (getbufferproc)record_getbuffer, (releasebufferproc)record_releasebuffer };
static PySequenceMethods record_sequence = { .sq_length = (lenfunc)record_length };
static PyTypeObject RecordType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "argo_streams.Record",
    .tp_basicsize = sizeof(Record),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_doc = "A record that was received; good until the loop asks for the next one.",
    .tp_dealloc = (destructor)record_dealloc,
    .tp_getset = record_getset,
    .tp_methods = record_methods,
    .tp_as_buffer = &record_buffer,
    .tp_as_sequence = &record_sequence,
};

/* ---- Stage ---- */

static int stage_usable(Stage *self)
{
    if (!self->stage) {
        PyErr_SetString(PyExc_ValueError, "the stage is closed");
        return 0;
    }
    if (self->is_busy) {
        PyErr_SetString(PyExc_RuntimeError, "another thread is in a call on this stage: a stage belongs to one thread at a time");
        return 0;
    }
    return 1;
}

/* Waits without the GIL until there may be something to do. */
static int stage_wait(Stage *self)
{
    for (;;) {
        ags_status status;
        self->is_busy = 1;
        Py_BEGIN_ALLOW_THREADS
        status = ags_stage_wait(self->stage, SIGNAL_LOOK_NS);
        Py_END_ALLOW_THREADS
        self->is_busy = 0;
        if (PyErr_CheckSignals() < 0)
            return -1;
        if (status == AGS_OK)
            return 0;
        if (status != AGS_TIMEOUT) {
            fail(status);
            return -1;
        }
    }
}

/* Finishes all records that were handed out. */
static int stage_flush(Stage *self)
{
    uint32_t place;
    self->has_current = 0;
    for (place = self->finished; place < self->next; place++)
        if (self->slots[place] && self->slots[place]->record && !record_finish(self->slots[place]))
            return -1;
    if (self->next > self->finished) {
        ags_status status = ags_stage_done(self->stage, self->next - self->finished);
        if (status != AGS_OK) {
            fail(status);
            return -1;
        }
        self->finished = self->next;
    }
    self->pending_bytes = 0;
    return 0;
}

static int stage_map(Stage *self, const ags_record *record)
{
    uint32_t input = record->input;
    if (input >= self->bases_len) {
        const char **bases = PyMem_Realloc(self->bases, (input + 1) * sizeof *bases);
        if (bases)
            self->bases = bases;
        uint32_t *generations = PyMem_Realloc(self->generations, (input + 1) * sizeof *generations);
        if (generations)
            self->generations = generations;
        if (!bases || !generations) {
            PyErr_NoMemory();
            return -1;
        }
        for (; self->bases_len <= input; self->bases_len++)
            self->bases[self->bases_len] = NULL;
    }
    if (!self->bases[input] || self->generations[input] != record->generation) {
        const void *base;
        uint64_t len;
        ags_status status = ags_stage_map(self->stage, input, &base, &len);
        if (status != AGS_OK) {
            fail(status);
            return -1;
        }
        self->bases[input] = base;
        self->generations[input] = record->generation;
    }
    return 0;
}

/* Receives the next batch. -1: an error is set, or the input is over. */
static int stage_fill(Stage *self)
{
    if (self->count) {
        uint64_t took_ns = now_ns() - self->begin_ns;
        if (took_ns > BATCH_NS_MAX)
            self->batch_max = self->batch_max > 1 ? self->batch_max / 2 : 1;
        else if (self->count == self->batch_max && self->batch_max < BATCH_RECORDS_MAX)
            self->batch_max *= 2;
        self->count = self->next = self->finished = 0;
    }
    for (;;) {
        ags_status status = ags_stage_recv(self->stage, self->records, self->batch_max, &self->count);
        if (status == AGS_OK)
            break;
        self->count = 0;
        if (status == AGS_INPUT_OVER || status == AGS_CLOSED) {
            self->is_over = 1;
            return -1;
        }
        if (status != AGS_AGAIN) {
            fail(status);
            return -1;
        }
        if (stage_wait(self) < 0)
            return -1;
    }
    self->begin_ns = now_ns();
    return 0;
}

static PyObject *stage_next(Stage *self)
{
    if (!stage_usable(self))
        return NULL;
    if ((self->next == self->count || self->pending_bytes >= PENDING_BYTES_MAX) && stage_flush(self) < 0)
        return NULL;
    self->has_current = 0;
    if (self->is_over)
        return NULL;
    for (;;) {
        if (self->next == self->count) {
            if (stage_flush(self) < 0 || stage_fill(self) < 0)
                return NULL;
        }
        const ags_record *record = &self->records[self->next];
        if (record->type != AGS_RECORD_DATA) {
            self->next++;
            continue;
        }
        if (stage_map(self, record) < 0)
            return NULL;
        Record *slot = self->slots[self->next];
        if (!slot || Py_REFCNT(slot) > 1) {
            slot = PyObject_New(Record, &RecordType);
            if (!slot)
                return NULL;
            slot->view = NULL;
            slot->exports = 0;
            Py_XSETREF(self->slots[self->next], slot);
        }
        slot->record = record;
        slot->base = self->bases[record->input];
        self->next++;
        self->has_current = 1;
        self->is_touched = 0;
        return Py_NewRef((PyObject *)slot);
    }
}

typedef struct {
    ags_bytes bytes;
    Py_buffer buffer;
    int is_buffer;
} Bytes;

static int bytes_of(PyObject *object, Bytes *out)
{
    out->is_buffer = 0;
    if (PyBytes_CheckExact(object)) {
        out->bytes.data = PyBytes_AS_STRING(object);
        out->bytes.len_bytes = (uint64_t)PyBytes_GET_SIZE(object);
    } else if (PyUnicode_Check(object)) {
        Py_ssize_t len;
        out->bytes.data = PyUnicode_AsUTF8AndSize(object, &len);
        if (!out->bytes.data)
            return -1;
        out->bytes.len_bytes = (uint64_t)len;
    } else {
        if (PyObject_GetBuffer(object, &out->buffer, PyBUF_SIMPLE) < 0)
            return -1;
        out->is_buffer = 1;
        out->bytes.data = out->buffer.buf;
        out->bytes.len_bytes = (uint64_t)out->buffer.len;
    }
    return 0;
}

static void bytes_release(Bytes *bytes)
{
    if (bytes->is_buffer)
        PyBuffer_Release(&bytes->buffer);
}

static void belongs(Stage *self, ags_emit *emit)
{
    if (self->has_current) {
        emit->belongs_to = AGS_BELONGS_TO_NTH;
        emit->nth = self->next - 1 - self->finished;
    } else {
        emit->belongs_to = AGS_BELONGS_TO_NOTHING;
    }
}

static int emit_now(Stage *self, uint32_t output, const ags_emit *emit)
{
    for (;;) {
        ags_status status = ags_stage_emit(self->stage, output, emit);
        if (status == AGS_OK) {
            self->pending_bytes += emit->payload.len_bytes + 64;
            return 0;
        }
        if (status == AGS_BATCH_FULL && emit->belongs_to == AGS_BELONGS_TO_NOTHING && self->next == self->finished && self->pending_bytes) {
            status = ags_stage_done(self->stage, 0);
            self->pending_bytes = 0;
            if (status == AGS_OK)
                continue;
        }
        if (status != AGS_AGAIN) {
            fail(status);
            return -1;
        }
        if (stage_wait(self) < 0)
            return -1;
    }
}

static int attributes_of(Stage *self, PyObject *dict, ags_bytes *out)
{
    PyObject *name, *value;
    Py_ssize_t place = 0;
    uint64_t used = 0;
    if (!PyDict_Check(dict)) {
        PyErr_SetString(PyExc_TypeError, "attributes is a dict of str to bytes");
        return -1;
    }
    if (!self->attributes) {
        self->attributes_size = 65536;
        self->attributes = PyMem_Malloc(self->attributes_size);
        if (!self->attributes) {
            PyErr_NoMemory();
            return -1;
        }
    }
    while (PyDict_Next(dict, &place, &name, &value)) {
        Bytes left, right;
        if (bytes_of(name, &left) < 0)
            return -1;
        if (bytes_of(value, &right) < 0) {
            bytes_release(&left);
            return -1;
        }
        ags_status status = ags_attributes_append(self->attributes, self->attributes_size, used, left.bytes, right.bytes, &used);
        bytes_release(&left);
        bytes_release(&right);
        if (status != AGS_OK) {
            fail(status);
            return -1;
        }
    }
    out->data = self->attributes;
    out->len_bytes = used;
    return 0;
}

static PyObject *stage_emit(Stage *self, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    if (!stage_usable(self))
        return NULL;
    if (nargs != 1) {
        PyErr_SetString(PyExc_TypeError, "emit(payload, *, key=..., event_time_ns=None, attributes=None, errors=False)");
        return NULL;
    }
    ags_emit emit = AGS_EMIT_INIT;
    uint32_t output = AGS_OUTPUT_MAIN;
    Bytes payload, key = { .is_buffer = 0 };
    int bad = 0;
    belongs(self, &emit);
    for (Py_ssize_t at = 0; names && at < PyTuple_GET_SIZE(names) && !bad; at++) {
        PyObject *name = PyTuple_GET_ITEM(names, at), *value = args[nargs + at];
        if (PyUnicode_CompareWithASCIIString(name, "key") == 0) {
            emit.key_choice = value == Py_None ? AGS_KEY_NONE : AGS_KEY_SET;
            if (value != Py_None) {
                bad = bytes_of(value, &key) < 0;
                emit.key = key.bytes;
            }
        } else if (PyUnicode_CompareWithASCIIString(name, "event_time_ns") == 0) {
            if (value != Py_None) {
                emit.flags |= AGS_EMIT_EVENT_TIME;
                emit.event_time_ns = PyLong_AsLongLong(value);
                bad = emit.event_time_ns == -1 && PyErr_Occurred();
            }
        } else if (PyUnicode_CompareWithASCIIString(name, "attributes") == 0) {
            bad = value != Py_None && attributes_of(self, value, &emit.attributes) < 0;
        } else if (PyUnicode_CompareWithASCIIString(name, "errors") == 0) {
            int truth = PyObject_IsTrue(value);
            bad = truth < 0;
            output = truth > 0 ? AGS_OUTPUT_ERRORS : AGS_OUTPUT_MAIN;
        } else {
            PyErr_Format(PyExc_TypeError, "emit has no argument %R", name);
            bad = 1;
        }
    }
    if (!bad && bytes_of(args[0], &payload) == 0) {
        self->is_touched = 1;
        emit.payload = payload.bytes;
        bad = emit_now(self, output, &emit) < 0;
        bytes_release(&payload);
    } else {
        bad = 1;
    }
    bytes_release(&key);
    if (bad)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *stage_reject(Stage *self, PyObject *reason)
{
    const char *text = PyUnicode_AsUTF8(reason);
    if (!text || !stage_usable(self))
        return NULL;
    if (!self->has_current) {
        PyErr_SetString(PyExc_ValueError, "there is no record to reject outside of the loop over the stage");
        return NULL;
    }
    self->is_touched = 1;
    for (;;) {
        ags_status status = ags_stage_reject(self->stage, self->next - 1 - self->finished, text);
        if (status == AGS_OK) {
            self->pending_bytes += self->records[self->next - 1].len_bytes + 64;
            Py_RETURN_NONE;
        }
        if (status != AGS_AGAIN)
            return fail(status);
        if (stage_wait(self) < 0)
            return NULL;
    }
}

static PyObject *stage_fail(Stage *self, PyObject *reason)
{
    const char *text = PyUnicode_AsUTF8(reason);
    if (!text || !stage_usable(self))
        return NULL;
    if (!self->has_current || self->is_touched) {
        PyErr_SetString(PyExc_ValueError, self->has_current ? "something was emitted, put or deleted for the record: fail it before"
                                                            : "there is no record to fail outside of the loop over the stage");
        return NULL;
    }
    /* Those before it are finished, and it itself is looked at no more. */
    Record *current = self->slots[self->next - 1];
    if (current && current->record && !record_finish(current))
        return NULL;
    self->next--;
    if (stage_flush(self) < 0)
        return NULL;
    for (;;) {
        ags_status status = ags_stage_fail(self->stage, text);
        if (status == AGS_OK)
            break;
        if (status != AGS_AGAIN)
            return fail(status);
        if (stage_wait(self) < 0)
            return NULL;
    }
    /* Those behind it were given back, and come again. */
    self->count = self->next = self->finished = 0;
    Py_RETURN_NONE;
}

static PyObject *stage_get(Stage *self, PyObject *name)
{
    Bytes key;
    ags_bytes value;
    if (!stage_usable(self) || bytes_of(name, &key) < 0)
        return NULL;
    ags_status status = ags_stage_get(self->stage, key.bytes, &value);
    bytes_release(&key);
    if (status != AGS_OK)
        return fail(status);
    if (!value.data)
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(value.data, (Py_ssize_t)value.len_bytes);
}

static PyObject *change(Stage *self, PyObject *name, PyObject *to)
{
    Bytes key, value;
    ags_status status;
    int failed = 0;
    if (!stage_usable(self) || bytes_of(name, &key) < 0)
        return NULL;
    self->is_touched = 1;
    if (to && bytes_of(to, &value) < 0) {
        bytes_release(&key);
        return NULL;
    }
    while ((status = to ? ags_stage_put(self->stage, key.bytes, value.bytes) : ags_stage_delete(self->stage, key.bytes)) == AGS_AGAIN && !failed)
        failed = stage_wait(self) < 0;
    bytes_release(&key);
    if (to)
        bytes_release(&value);
    if (failed)
        return NULL;
    if (status != AGS_OK)
        return fail(status);
    Py_RETURN_NONE;
}

static PyObject *stage_put(Stage *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "put(key, value)");
        return NULL;
    }
    return change(self, args[0], args[1]);
}

static PyObject *stage_delete(Stage *self, PyObject *key)
{
    return change(self, key, NULL);
}

static PyObject *stage_interrupt(Stage *self, PyObject *unused)
{
    if (self->stage)
        ags_stage_interrupt(self->stage);
    Py_RETURN_NONE;
}

/* Closes if nothing looks at the mappings any more. */
static int stage_end(Stage *self)
{
    for (uint32_t place = 0; place < BATCH_RECORDS_MAX; place++)
        if (self->slots[place] && self->slots[place]->record && !record_finish(self->slots[place]))
            return -1;
    for (uint32_t place = 0; place < BATCH_RECORDS_MAX; place++)
        Py_CLEAR(self->slots[place]);
    ags_stage *stage = self->stage;
    self->stage = NULL;
    Py_BEGIN_ALLOW_THREADS
    ags_stage_close(stage);
    Py_END_ALLOW_THREADS
    return 0;
}

static PyObject *stage_close(Stage *self, PyObject *unused)
{
    if (!self->stage)
        Py_RETURN_NONE;
    if (!stage_usable(self))
        return NULL;
    if (self->is_over) {
        ags_status status = ags_stage_done(self->stage, 0);
        if (status != AGS_OK)
            return fail(status);
    }
    if (stage_end(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *stage_enter(PyObject *self, PyObject *unused)
{
    return Py_NewRef(self);
}

static PyObject *stage_exit(Stage *self, PyObject *args)
{
    PyObject *kind, *value, *trace;
    if (!PyArg_ParseTuple(args, "OOO", &kind, &value, &trace))
        return NULL;
    if (kind == Py_None)
        return stage_close(self, NULL);
    /* What failed is not done. Once the end was told, a close would publish the end; the next process shall do that. */
    if (self->stage && !self->is_busy) {
        ags_stage_abort(self->stage);
        if (self->is_over || stage_end(self) < 0) {
            PyErr_Clear();
            self->stage = NULL;
        }
    }
    Py_RETURN_NONE;
}

static void stage_dealloc(Stage *self)
{
    if (self->stage && !self->is_over && stage_end(self) < 0)
        PyErr_Clear(); /* a view outlives its stage: its memory stays */
    for (uint32_t place = 0; place < BATCH_RECORDS_MAX; place++)
        Py_CLEAR(self->slots[place]);
    PyMem_Free(self->bases);
    PyMem_Free(self->generations);
    PyMem_Free(self->attributes);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *stage_name(Stage *self, void *unused)
{
    return self->stage ? PyUnicode_DecodeUTF8(ags_stage_name(self->stage), (Py_ssize_t)strlen(ags_stage_name(self->stage)), "replace") : Py_NewRef(empty);
}

/* ---- items() ---- */

typedef struct {
    PyObject_HEAD
    Stage *stage;
    ags_cursor cursor;
    PyObject *batch;
    Py_ssize_t at;
} Items;

static PyObject *items_next(Items *self)
{
    while (!self->batch || self->at == PyList_GET_SIZE(self->batch)) {
        ags_entry entries[64];
        uint32_t count;
        if (self->cursor.flags & AGS_CURSOR_OVER)
            return NULL;
        if (!stage_usable(self->stage))
            return NULL;
        ags_status status = ags_stage_iterate(self->stage->stage, &self->cursor, entries, 64, &count, &self->cursor);
        if (status != AGS_OK)
            return fail(status);
        Py_XSETREF(self->batch, PyList_New(0));
        if (!self->batch)
            return NULL;
        self->at = 0;
        for (uint32_t place = 0; place < count; place++) {
            PyObject *pair = Py_BuildValue("y#y#", entries[place].key.data ? entries[place].key.data : "", (Py_ssize_t)entries[place].key.len_bytes,
                entries[place].value.data ? entries[place].value.data : "", (Py_ssize_t)entries[place].value.len_bytes);
            if (!pair || PyList_Append(self->batch, pair) < 0) {
                Py_XDECREF(pair);
                return NULL;
            }
            Py_DECREF(pair);
        }
    }
    return Py_NewRef(PyList_GET_ITEM(self->batch, self->at++));
}

static void items_dealloc(Items *self)
{
    Py_XDECREF(self->batch);
    Py_XDECREF(self->stage);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject ItemsType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "argo_streams.Items",
    .tp_basicsize = sizeof(Items),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)items_dealloc,
    .tp_iter = PyObject_SelfIter,
    .tp_iternext = (iternextfunc)items_next,
};

static PyObject *stage_items(Stage *self, PyObject *unused)
{
    ags_cursor begin = AGS_CURSOR_INIT;
    if (!stage_usable(self))
        return NULL;
    Items *items = PyObject_New(Items, &ItemsType);
    if (!items)
        return NULL;
    items->stage = (Stage *)Py_NewRef((PyObject *)self);
    items->cursor = begin;
    items->batch = NULL;
    items->at = 0;
    return (PyObject *)items;
}

static PyMethodDef stage_methods[] = {
    { "emit", (PyCFunction)(void (*)(void))stage_emit, METH_FASTCALL | METH_KEYWORDS,
        "emit(payload, *, key=..., event_time_ns=None, attributes=None, errors=False)\n\n"
        "Emits a record (bytes-like or str) that belongs to the record of the loop; it counts when that one is finished. Key and event time are "
        "those of that record unless given; key=None: no key. errors: to the error output. Waits, without the GIL, while there is no room." },
    { "reject", (PyCFunction)stage_reject, METH_O, "reject(reason)\n\nSends the record of the loop as it came to the error output." },
    { "fail", (PyCFunction)stage_fail, METH_O,
        "fail(reason)\n\nThe record of the loop failed, for now: as the step's onError says it comes again later or goes to the error output, and the loop goes on. "
        "Call it before anything is emitted, put or deleted for the record." },
    { "get", (PyCFunction)stage_get, METH_O, "get(key) -> bytes or None\n\nThe value of a key in the keyed state, as of the last put." },
    { "put", (PyCFunction)(void (*)(void))stage_put, METH_FASTCALL, "put(key, value)\n\nSets the value of a key; counts with the record of the loop." },
    { "delete", (PyCFunction)stage_delete, METH_O, "delete(key)\n\nTakes a key away; counts with the record of the loop." },
    { "items", (PyCFunction)stage_items, METH_NOARGS, "items() -> iterator of (key, value)\n\nAll of the keyed state, in no order." },
    { "interrupt", (PyCFunction)stage_interrupt, METH_NOARGS, "interrupt()\n\nFrom another thread: the wait of the loop ends with Interrupted." },
    { "close", (PyCFunction)stage_close, METH_NOARGS,
        "close()\n\nFinishes the stage if its input is over, and frees it; records that are not finished come again, to the next process." },
    { "__enter__", stage_enter, METH_NOARGS, NULL },
    { "__exit__", (PyCFunction)stage_exit, METH_VARARGS, NULL },
    { NULL },
};
static PyGetSetDef stage_getset[] = {
    { "name", (getter)stage_name, NULL, "The step's name.", NULL },
    { NULL },
};
static PyTypeObject StageType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "argo_streams.Stage",
    .tp_basicsize = sizeof(Stage),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_doc = "An open stage: iterate over it for its records. A record is finished when the next one is asked for.",
    .tp_dealloc = (destructor)stage_dealloc,
    .tp_iter = PyObject_SelfIter,
    .tp_iternext = (iternextfunc)stage_next,
    .tp_methods = stage_methods,
    .tp_getset = stage_getset,
};

static PyObject *module_open(PyObject *module, PyObject *args, PyObject *names)
{
    static char *words[] = { "socket_path", NULL };
    const char *path = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, names, "|z:open", words, &path))
        return NULL;
    ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
    options.flags = AGS_STAGE_TELL_INPUT_OVER;
    options.socket_path = path;
    ags_stage *stage = NULL;
    ags_status status;
    Py_BEGIN_ALLOW_THREADS
    status = ags_stage_open(&options, &stage);
    Py_END_ALLOW_THREADS
    if (status != AGS_OK)
        return fail(status);
    Stage *self = (Stage *)StageType.tp_alloc(&StageType, 0);
    if (!self) {
        ags_stage_close(stage);
        return NULL;
    }
    self->stage = stage;
    self->batch_max = 1;
    return (PyObject *)self;
}

static PyMethodDef module_methods[] = {
    { "open", (PyCFunction)(void (*)(void))module_open, METH_VARARGS | METH_KEYWORDS,
        "open(socket_path=None) -> Stage\n\nOpens the stage that the agent keeps for this program. Before anything is read from standard input." },
    { NULL },
};
static struct PyModuleDef module = { PyModuleDef_HEAD_INIT, "argo_streams", "A program as a step of an Argo Streams pipeline, over shared memory.", -1, module_methods };

PyMODINIT_FUNC PyInit_argo_streams(void)
{
    if (PyType_Ready(&RecordType) < 0 || PyType_Ready(&StageType) < 0 || PyType_Ready(&ItemsType) < 0)
        return NULL;
    PyObject *self = PyModule_Create(&module);
    if (!self)
        return NULL;
    empty = PyUnicode_FromString("");
    Error = PyErr_NewExceptionWithDoc("argo_streams.Error", "A call failed; status is its number in argo_streams.h.", NULL, NULL);
    Interrupted = Error ? PyErr_NewExceptionWithDoc("argo_streams.Interrupted", "Stage.interrupt ended a wait.", Error, NULL) : NULL;
    if (!empty || !Interrupted || PyModule_AddObjectRef(self, "Error", Error) < 0 || PyModule_AddObjectRef(self, "Interrupted", Interrupted) < 0
        || PyModule_AddObjectRef(self, "Stage", (PyObject *)&StageType) < 0 || PyModule_AddObjectRef(self, "Record", (PyObject *)&RecordType) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return self;
}
