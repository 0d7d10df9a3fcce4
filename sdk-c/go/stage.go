// Package argostreams makes a Go program a step of an Argo Streams pipeline, over shared memory.
//
//	stage, err := argostreams.Open()
//	...
//	for stage.Next() {
//		if err := stage.Emit(stage.Record().Payload()); err != nil {
//			log.Fatal(err)
//		}
//	}
//	if err := stage.Close(); err != nil {
//		log.Fatal(err)
//	}
//
// A record is finished when Next is called again; what was emitted and put for it counts together with that. Records are received and
// finished in batches, one call of C each; a batch is as long as what 1 ms of work was before, so that a slow program still finishes
// each record by itself.
//
// Bytes of a record are shared memory, mapped read-only: a write to them ends the program, and so may a look at a slice that was kept
// after Next. A Record that was kept panics instead. Copy what is needed longer.
package argostreams

/*
#cgo pkg-config: argo-streams
#cgo LDFLAGS: -lgcc_s -lpthread -ldl -lm
#include <argo_streams.h>
#include <stdio.h>
#include <stdlib.h>

#define BATCH_RECORDS_MAX 256

// All that a call needs lies in C's memory: a Go array of records would be copied and checked for pointers at each call.
typedef struct {
	ags_stage *stage;
	uint32_t count;
	ags_record records[BATCH_RECORDS_MAX];
	ags_entry entries[64];
	ags_cursor cursor;
	ags_bytes value;
	char sentence[1024];
} session;

// The sentence of a failure is the thread's, and a goroutine may be on another one at its next call.
static ags_status leave(session *self, ags_status status)
{
	if (status != AGS_OK) {
		const char *sentence = ags_last_error();
		if (ags_status_class(status) == AGS_CLASS_TRY_AGAIN || sentence[0] == 0)
			sentence = ags_status_text(status);
		snprintf(self->sentence, sizeof self->sentence, "%s", sentence);
	}
	return status;
}

static ags_status session_open(session *self, const char *path)
{
	ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
	options.flags = AGS_STAGE_TELL_INPUT_OVER;
	options.socket_path = path;
	return leave(self, ags_stage_open(&options, &self->stage));
}

static ags_status session_done(session *self, uint32_t records)
{
	return leave(self, ags_stage_done(self->stage, records));
}

static ags_status session_fill(session *self, uint32_t finished, uint32_t max)
{
	ags_status status = finished ? ags_stage_done(self->stage, finished) : AGS_OK;
	self->count = 0;
	while (status == AGS_OK) {
		status = ags_stage_recv(self->stage, self->records, max, &self->count);
		if (status != AGS_AGAIN)
			break;
		status = ags_stage_wait(self->stage, AGS_FOREVER);
	}
	return leave(self, status);
}

static ags_status session_map(session *self, uint32_t input, const void **base)
{
	uint64_t len;
	return leave(self, ags_stage_map(self->stage, input, base, &len));
}

static ags_status session_emit(session *self, uint32_t output, uint32_t belongs_to, uint64_t nth, uint32_t key_choice, uint32_t flags, int64_t event_time_ns,
	const char *key, uint64_t key_len, const char *attributes, uint64_t attributes_len, const char *payload, uint64_t payload_len)
{
	ags_emit emit = AGS_EMIT_INIT;
	emit.belongs_to = belongs_to;
	emit.nth = nth;
	emit.key_choice = key_choice;
	emit.flags = flags;
	emit.event_time_ns = event_time_ns;
	emit.key = (ags_bytes){ key, key_len };
	emit.attributes = (ags_bytes){ attributes, attributes_len };
	emit.payload = (ags_bytes){ payload, payload_len };
	ags_status status;
	while ((status = ags_stage_emit(self->stage, output, &emit)) == AGS_AGAIN)
		if ((status = ags_stage_wait(self->stage, AGS_FOREVER)) != AGS_OK)
			break;
	return leave(self, status);
}

static ags_status session_reject(session *self, uint64_t nth, const char *reason)
{
	ags_status status;
	while ((status = ags_stage_reject(self->stage, nth, reason)) == AGS_AGAIN)
		if ((status = ags_stage_wait(self->stage, AGS_FOREVER)) != AGS_OK)
			break;
	return leave(self, status);
}

static ags_status session_fail(session *self, const char *reason)
{
	ags_status status;
	while ((status = ags_stage_fail(self->stage, reason)) == AGS_AGAIN)
		if ((status = ags_stage_wait(self->stage, AGS_FOREVER)) != AGS_OK)
			break;
	return leave(self, status);
}

static ags_status session_get(session *self, const char *key, uint64_t key_len)
{
	return leave(self, ags_stage_get(self->stage, (ags_bytes){ key, key_len }, &self->value));
}

static ags_status session_put(session *self, int is_delete, const char *key, uint64_t key_len, const char *value, uint64_t value_len)
{
	ags_bytes at = { key, key_len }, to = { value, value_len };
	ags_status status;
	while ((status = is_delete ? ags_stage_delete(self->stage, at) : ags_stage_put(self->stage, at, to)) == AGS_AGAIN)
		if ((status = ags_stage_wait(self->stage, AGS_FOREVER)) != AGS_OK)
			break;
	return leave(self, status);
}

static void session_begin(session *self)
{
	ags_cursor begin = AGS_CURSOR_INIT;
	self->cursor = begin;
}

static ags_status session_iterate(session *self)
{
	self->count = 0;
	return leave(self, ags_stage_iterate(self->stage, &self->cursor, self->entries, 64, &self->count, &self->cursor));
}

static ags_status session_attribute(session *self, const char *list, uint64_t list_len, const char *name, uint64_t name_len)
{
	return leave(self, ags_attributes_find((ags_bytes){ list, list_len }, (ags_bytes){ name, name_len }, &self->value));
}
*/
import "C"

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"
	"unsafe"
)

const (
	batchRecordsMax = C.BATCH_RECORDS_MAX
	// Far from what fills the shortest ring (256 KiB), so that the outputs of one more record have room.
	pendingBytesMax = 32 * 1024
	// A batch that took longer is followed by a shorter one.
	batchTimeMax = time.Millisecond
	// What a record takes in a ring beside its payload.
	recordHeadBytes = 64
	attributesMax   = 64 * 1024
)

// ErrInterrupted is what errors.Is finds in the error of a wait that Interrupt ended.
var ErrInterrupted = errors.New("interrupted")

// Error is a call that failed. Status is its number in argo_streams.h.
type Error struct {
	Status   int
	Name     string
	Sentence string
}

func (e *Error) Error() string { return e.Name + ": " + e.Sentence }

// Is says whether target is ErrInterrupted and this is one.
func (e *Error) Is(target error) bool {
	return target == ErrInterrupted && e.Status == C.AGS_INTERRUPTED
}

func failure(status C.ags_status, sentence string) error {
	return &Error{Status: int(status), Name: C.GoString(C.ags_status_name(status)), Sentence: sentence}
}

// Stage is the stage of this program. It belongs to one goroutine at a time; only Interrupt may come from another.
type Stage struct {
	c                             *C.session
	records                       []C.ags_record
	mappings                      []mapping
	batchMax                      int
	count, next, finished         int
	begin                         time.Time
	pendingBytes                  int
	number                        uint64 // of the current record, for those that were kept
	hasCurrent, isOver, isTouched bool
	err                           error
	interrupt                     sync.Mutex // held by Interrupt and Close
	attributes                    []byte
}

type mapping struct {
	base       unsafe.Pointer
	generation C.uint32_t
}

// Open opens the stage that the agent keeps for this program, by $AGS_SOCKET; with `transport: auto` before anything is read from
// standard input. It blocks until the agent has answered, at most 30 s for each question.
func Open() (*Stage, error) { return OpenAt("") }

// OpenAt is Open at a socket; "" is $AGS_SOCKET.
func OpenAt(socketPath string) (*Stage, error) {
	session := (*C.session)(C.calloc(1, C.sizeof_session))
	if session == nil {
		return nil, failure(C.AGS_NO_MEMORY, "no memory for a session")
	}
	var path *C.char
	if socketPath != "" {
		path = C.CString(socketPath)
		defer C.free(unsafe.Pointer(path))
	}
	if status := C.session_open(session, path); status != C.AGS_OK {
		err := failure(status, C.GoString(&session.sentence[0]))
		C.free(unsafe.Pointer(session))
		return nil, err
	}
	return &Stage{c: session, records: session.records[:], batchMax: 1}, nil
}

func (s *Stage) check(status C.ags_status) error {
	if status == C.AGS_OK {
		return nil
	}
	return failure(status, C.GoString(&s.c.sentence[0]))
}

func (s *Stage) open() error {
	if s.c == nil {
		return failure(C.AGS_STATE, "the stage is closed")
	}
	return nil
}

// Next finishes the record before and takes the next one. It blocks until there is one. It says false when the input is over, and what
// is emitted after that is a last result; and when something failed, which Err and Close tell.
func (s *Stage) Next() bool {
	s.hasCurrent = false
	s.number++
	if s.err = s.open(); s.err != nil {
		return false
	}
	more, err := s.advance()
	s.err = err
	return more && err == nil
}

func (s *Stage) advance() (bool, error) {
	if s.pendingBytes >= pendingBytesMax {
		if err := s.flush(); err != nil {
			return false, err
		}
	}
	for {
		if s.next == s.count {
			if s.isOver {
				return false, s.flush()
			}
			if more, err := s.fill(); !more || err != nil {
				return false, err
			}
		}
		record := &s.records[s.next]
		if record._type == C.AGS_RECORD_DATA {
			if err := s.look(record); err != nil {
				return false, err
			}
			s.next++
			s.hasCurrent, s.isTouched = true, false
			return true, nil
		}
		s.next++
	}
}

func (s *Stage) flush() error {
	if s.next > s.finished {
		if err := s.check(C.session_done(s.c, C.uint32_t(s.next-s.finished))); err != nil {
			return err
		}
	}
	s.finished = s.next
	s.pendingBytes = 0
	return nil
}

func (s *Stage) fill() (bool, error) {
	if s.count > 0 {
		if time.Since(s.begin) > batchTimeMax {
			if s.batchMax > 1 {
				s.batchMax /= 2
			}
		} else if s.count == s.batchMax && s.batchMax < batchRecordsMax {
			s.batchMax *= 2
		}
	}
	status := C.session_fill(s.c, C.uint32_t(s.next-s.finished), C.uint32_t(s.batchMax))
	s.pendingBytes = 0
	s.count, s.next, s.finished = int(s.c.count), 0, 0
	switch status {
	case C.AGS_OK:
		s.begin = time.Now()
		return true, nil
	case C.AGS_INPUT_OVER, C.AGS_CLOSED:
		s.count, s.isOver = 0, true
		return false, nil
	}
	s.count = 0
	return false, s.check(status)
}

func (s *Stage) look(record *C.ags_record) error {
	input := int(record.input)
	for input >= len(s.mappings) {
		s.mappings = append(s.mappings, mapping{})
	}
	known := &s.mappings[input]
	if known.base == nil || known.generation != record.generation {
		if err := s.check(C.session_map(s.c, record.input, &s.c.value.data)); err != nil {
			return err
		}
		known.base, known.generation = s.c.value.data, record.generation
	}
	return nil
}

// Err is what ended the loop over Next, nil if the input is over.
func (s *Stage) Err() error { return s.err }

// Record is the current record, good until Next is called again.
func (s *Stage) Record() Record {
	if !s.hasCurrent {
		panic("argostreams: there is no record outside of the loop over Next")
	}
	return Record{s, s.number}
}

// nth is the place of the current record among those that are not done.
func (s *Stage) belongs() (C.uint32_t, C.uint64_t) {
	if s.hasCurrent {
		return C.AGS_BELONGS_TO_NTH, C.uint64_t(s.next - 1 - s.finished)
	}
	return C.AGS_BELONGS_TO_NOTHING, 0
}

// Options says how a record is emitted. The zero value is what Emit does.
type Options struct {
	Key        []byte            // nil: that of the record that it belongs to
	NoKey      bool              // without a key
	EventTime  time.Time         // zero: that of the record that it belongs to
	Attributes map[string][]byte // together at most 64 KiB
	ToErrors   bool              // to the error output
}

// Emit emits a record that belongs to the current one, and has its key and time; it counts when that one is finished. It blocks while
// there is no room.
func (s *Stage) Emit(payload []byte) error { return s.EmitWith(payload, Options{}) }

// EmitWith is Emit with another key or time, with attributes, or to the error output.
func (s *Stage) EmitWith(payload []byte, options Options) error {
	if err := s.open(); err != nil {
		return err
	}
	output, keyChoice, flags, eventTime := C.uint32_t(C.AGS_OUTPUT_MAIN), C.uint32_t(C.AGS_KEY_INHERIT), C.uint32_t(0), C.int64_t(0)
	if options.ToErrors {
		output = C.AGS_OUTPUT_ERRORS
	}
	if options.NoKey {
		keyChoice = C.AGS_KEY_NONE
	} else if options.Key != nil {
		keyChoice = C.AGS_KEY_SET
	}
	if !options.EventTime.IsZero() {
		flags, eventTime = C.AGS_EMIT_EVENT_TIME, C.int64_t(options.EventTime.UnixNano())
	}
	if err := s.encode(options.Attributes); err != nil {
		return err
	}
	belongsTo, nth := s.belongs()
	for {
		key, attributes, bytes := some(options.Key), some(s.attributes), some(payload)
		status := C.session_emit(s.c, output, belongsTo, nth, keyChoice, flags, eventTime,
			(*C.char)(unsafe.Pointer(&key[0])), C.uint64_t(len(options.Key)),
			(*C.char)(unsafe.Pointer(&attributes[0])), C.uint64_t(len(s.attributes)),
			(*C.char)(unsafe.Pointer(&bytes[0])), C.uint64_t(len(payload)))
		if status == C.AGS_BATCH_FULL && !s.hasCurrent && s.next == s.finished && s.pendingBytes > 0 {
			if err := s.check(C.session_done(s.c, 0)); err != nil {
				return err
			}
			s.pendingBytes = 0
			continue
		}
		if status == C.AGS_OK {
			s.pendingBytes += len(payload) + recordHeadBytes
			s.isTouched = true
		}
		return s.check(status)
	}
}

// encode is what PROTOCOL.md calls Attributes: u16 length of the name, u32 length of the value, name, value.
func (s *Stage) encode(attributes map[string][]byte) error {
	s.attributes = s.attributes[:0]
	for name, value := range attributes {
		if len(name) > 65535 || len(s.attributes)+6+len(name)+len(value) > attributesMax {
			return failure(C.AGS_TOO_LARGE, fmt.Sprintf("the attributes have more than %d bytes with %.40q", attributesMax, name))
		}
		s.attributes = append(s.attributes, 0, 0, 0, 0, 0, 0)
		head := s.attributes[len(s.attributes)-6:]
		binary.LittleEndian.PutUint16(head, uint16(len(name)))
		binary.LittleEndian.PutUint32(head[2:], uint32(len(value)))
		s.attributes = append(append(s.attributes, name...), value...)
	}
	return nil
}

var nothing = make([]byte, 1)

// some is a slice that has a first byte, so that &some(x)[0] can be passed to C, which looks at no more than that slice then.
func some(bytes []byte) []byte {
	if len(bytes) == 0 {
		return nothing
	}
	return bytes
}

// Reject sends the current record as it came to the error output, with the reason as an attribute.
func (s *Stage) Reject(reason string) error {
	if err := s.open(); err != nil {
		return err
	}
	if !s.hasCurrent {
		return failure(C.AGS_STATE, "there is no record to reject outside of the loop over Next")
	}
	text := C.CString(reason)
	defer C.free(unsafe.Pointer(text))
	_, nth := s.belongs()
	status := C.session_reject(s.c, nth, text)
	if status == C.AGS_OK {
		s.pendingBytes += int(s.records[s.next-1].len_bytes) + recordHeadBytes
		s.isTouched = true
	}
	return s.check(status)
}

// Fail says that the current record failed, for now: as the step's onError says it comes again later or goes to the error output, and the
// loop goes on. Call it before anything was emitted, put or deleted for the record. It blocks while the error output is full.
func (s *Stage) Fail(reason string) error {
	if err := s.open(); err != nil {
		return err
	}
	if !s.hasCurrent {
		return failure(C.AGS_STATE, "there is no record to fail outside of the loop over Next")
	}
	if s.isTouched {
		return failure(C.AGS_STATE, "something was emitted, put or deleted for the record: fail it before")
	}
	text := C.CString(reason)
	defer C.free(unsafe.Pointer(text))
	// Those before it are finished. If the wait is interrupted, this one comes again with Next.
	s.hasCurrent = false
	s.number++
	s.next--
	if err := s.flush(); err != nil {
		return err
	}
	if err := s.check(C.session_fail(s.c, text)); err != nil {
		return err
	}
	// Those behind it were given back, and come again.
	s.count, s.next, s.finished = 0, 0, 0
	return nil
}

// Get is a copy of the value of a key in the stage's keyed state, as of the last Put; nil if there is none.
func (s *Stage) Get(key []byte) ([]byte, error) {
	if err := s.open(); err != nil {
		return nil, err
	}
	at := some(key)
	status := C.session_get(s.c, (*C.char)(unsafe.Pointer(&at[0])), C.uint64_t(len(key)))
	if status != C.AGS_OK || s.c.value.data == nil {
		return nil, s.check(status)
	}
	return append([]byte{}, view(s.c.value)...), nil
}

// Put sets the value of a key; it counts with the current record. It blocks while the state grows, which is rare.
func (s *Stage) Put(key, value []byte) error { return s.change(0, key, value) }

// Delete takes a key away; it counts with the current record.
func (s *Stage) Delete(key []byte) error { return s.change(1, key, nil) }

func (s *Stage) change(isDelete C.int, key, value []byte) error {
	if err := s.open(); err != nil {
		return err
	}
	s.isTouched = true
	at, to := some(key), some(value)
	return s.check(C.session_put(s.c, isDelete, (*C.char)(unsafe.Pointer(&at[0])), C.uint64_t(len(key)),
		(*C.char)(unsafe.Pointer(&to[0])), C.uint64_t(len(value))))
}

// Items calls visit for all of the keyed state, in no order, until visit returns an error, which Items returns then. visit may emit, put
// and delete; key and value are its own.
func (s *Stage) Items(visit func(key, value []byte) error) error {
	if err := s.open(); err != nil {
		return err
	}
	C.session_begin(s.c)
	cursor := s.c.cursor
	for cursor.flags&C.AGS_CURSOR_OVER == 0 {
		s.c.cursor = cursor // visit may itself walk
		if err := s.check(C.session_iterate(s.c)); err != nil {
			return err
		}
		cursor = s.c.cursor
		items := make([][2][]byte, int(s.c.count))
		for at := range items {
			entry := &s.c.entries[at]
			items[at] = [2][]byte{append([]byte{}, view(entry.key)...), append([]byte{}, view(entry.value)...)}
		}
		for _, item := range items {
			if err := visit(item[0], item[1]); err != nil {
				return err
			}
		}
	}
	return nil
}

func view(bytes C.ags_bytes) []byte {
	if bytes.len_bytes == 0 {
		return []byte{}
	}
	return unsafe.Slice((*byte)(bytes.data), int(bytes.len_bytes))
}

// Name is the step's name.
func (s *Stage) Name() string {
	if s.c == nil {
		return ""
	}
	return C.GoString(C.ags_stage_name(s.c.stage))
}

// Interrupt ends the wait that is under way, or the next one, with an error that is ErrInterrupted. From any goroutine.
func (s *Stage) Interrupt() {
	s.interrupt.Lock()
	defer s.interrupt.Unlock()
	if s.c != nil {
		C.ags_stage_interrupt(s.c.stage)
	}
}

// Close finishes the stage if its input is over, and frees it; what is not finished comes again, to the program's next process. It
// returns what ended the loop over Next if that failed: then nothing is finished, and the program should end.
func (s *Stage) Close() error {
	if s.c == nil {
		return nil
	}
	err := s.err
	if err == nil && s.isOver {
		err = s.check(C.session_done(s.c, 0))
	}
	s.interrupt.Lock()
	defer s.interrupt.Unlock()
	// Once the input is over a close publishes the end; what failed before that is left to the next process.
	if err == nil || !s.isOver {
		C.ags_stage_close(s.c.stage)
	}
	C.free(unsafe.Pointer(s.c))
	s.c, s.hasCurrent = nil, false
	s.number++
	return err
}

// Record is a record that was received.
type Record struct {
	stage  *Stage
	number uint64
}

func (r Record) raw() *C.ags_record {
	if r.number != r.stage.number || r.stage.c == nil {
		panic("argostreams: this record is finished: copy what is needed after Next")
	}
	return &r.stage.records[r.stage.next-1]
}

func (r Record) at(offset, length C.uint64_t) []byte {
	if length == 0 {
		return []byte{}
	}
	return unsafe.Slice((*byte)(unsafe.Add(r.stage.mappings[r.raw().input].base, int(offset))), int(length))
}

// Payload is the payload, in shared memory: good until Next is called again, and never to be written.
func (r Record) Payload() []byte { c := r.raw(); return r.at(c.offset, c.len_bytes) }

// Key is the key, in shared memory; nil without one.
func (r Record) Key() []byte {
	c := r.raw()
	if c.flags&C.AGS_RECORD_KEYED == 0 {
		return nil
	}
	return r.at(c.key_offset, c.key_len_bytes)
}

// Attribute is an attribute by its name, in shared memory; nil if there is none.
func (r Record) Attribute(name string) []byte {
	c := r.raw()
	if c.attributes_len_bytes == 0 {
		return nil
	}
	list, wanted := r.at(c.attributes_offset, c.attributes_len_bytes), some([]byte(name))
	status := C.session_attribute(r.stage.c, (*C.char)(unsafe.Pointer(&list[0])), c.attributes_len_bytes, (*C.char)(unsafe.Pointer(&wanted[0])), C.uint64_t(len(name)))
	if status != C.AGS_OK || r.stage.c.value.data == nil {
		return nil
	}
	return view(r.stage.c.value)
}

// EventTime is when it happened.
func (r Record) EventTime() time.Time { return time.Unix(0, int64(r.raw().event_time_ns)) }

// Attempts is how often it failed before, see Stage.Fail.
func (r Record) Attempts() uint32 { return uint32(r.raw().attempts) }

// Input is the number of the input that it came from.
func (r Record) Input() uint32 { return uint32(r.raw().input) }

// Position is its place in its input; it grows from record to record, also over restarts.
func (r Record) Position() uint64 { return uint64(r.raw().position) }
