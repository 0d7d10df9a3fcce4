// A Node.js program as a step of an Argo Streams pipeline, over shared memory.
//
//     const { open } = require('argo-streams');
//     const stage = open();
//     for await (const record of stage) await stage.emit(record.payload);
//     await stage.close();
//
// A record is finished when the loop asks for the next one; what was emitted and put for it counts together with that. Records are received
// and finished in batches; a batch is as long as what 1 ms of work was before, so that a slow program still finishes each record by itself.
// While there is nothing to receive a thread of libuv's pool waits, and the event loop goes on.
//
// A payload is a Buffer over shared memory, good until the next record is asked for, and read-only: a write to it ends the process. At the
// end of its batch it is detached, so that one that was kept has no bytes any more.
'use strict';
const native = require('./native/argo_streams.node');

// The numbers of argo_streams.h.
const AGAIN = -1, BATCH_FULL = -4, INPUT_OVER = -6, STATE = -22, TOO_LARGE = -21, CLOSED = -40;
const OUTPUT_MAIN = 0, OUTPUT_ERRORS = 1;
const KEY_INHERIT = 0, KEY_NONE = 1, KEY_SET = 2;

const BATCH_RECORDS_MAX = 256;
// Far from what fills the shortest ring (256 KiB), so that the outputs of one more record have room.
const PENDING_BYTES_MAX = 32 * 1024;
// A batch that took longer is followed by a shorter one.
const BATCH_MS_MAX = 1;
// What a record takes in a ring beside its payload.
const RECORD_HEAD_BYTES = 64;
// What may wait for room because nobody waits for emit.
const QUEUE_BYTES_MAX = 64 * 1024 * 1024;
const ATTRIBUTES_BYTES_MAX = 64 * 1024;

// Where the fields of an ags_record lie, in words of 32 bits; those of 64 bits have their low half first.
const RECORD_WORDS = 32;
const OFFSET = 0, LEN = 2, KEY_OFFSET = 4, KEY_LEN = 6, ATTRIBUTES_OFFSET = 10, ATTRIBUTES_LEN = 12, EVENT_TIME = 14, POSITION = 18;
const INPUT = 24, TYPE = 25, FLAGS = 26, ATTEMPTS = 30;

/** A call failed. `status` is its number in argo_streams.h, `code` its name, such as 'AGS_INTERRUPTED'. */
class AgsError extends Error {
  constructor(status, code, sentence) {
    super(`${code}: ${sentence}`);
    this.name = 'AgsError';
    this.status = status;
    this.code = code;
  }
}

function failure(status) {
  const [code, sentence] = native.last(status);
  return new AgsError(status, code, sentence);
}

function check(status) {
  if (typeof status === 'number' && status < 0) throw failure(status);
  return status;
}

const bytes = (from) => (typeof from === 'string' ? Buffer.from(from) : from);

/** A record that was received; good until the loop asks for the next one. */
class Record {
  #stage;
  #at;
  #batch;
  #payload;
  constructor(stage, at, batch) {
    this.#stage = stage;
    this.#at = at * RECORD_WORDS;
    this.#batch = batch;
  }
  #words() {
    if (this.#batch !== this.#stage._batch) throw new AgsError(STATE, 'AGS_STATE', 'the record is finished: copy what is needed longer, with Buffer.from()');
    return this.#stage._words;
  }
  #bytes(offset, len) {
    const words = this.#words(), at = this.#at;
    const length = words[at + len] + words[at + len + 1] * 2 ** 32;
    if (length === 0) return Buffer.alloc(0);
    return Buffer.from(this.#stage._mapping(words[at + INPUT]), words[at + offset] + words[at + offset + 1] * 2 ** 32, length);
  }
  /** The payload, in shared memory: never write to it. */
  get payload() { return (this.#payload ??= this.#bytes(OFFSET, LEN)); }
  /** The key, in shared memory; null without one. */
  get key() { return this.#words()[this.#at + FLAGS] & 1 ? this.#bytes(KEY_OFFSET, KEY_LEN) : null; }
  /** When it happened, ns since 1970, as a BigInt. */
  get eventTimeNs() { return BigInt.asIntN(64, this.#long(EVENT_TIME)); }
  /** Its place in its input, as a BigInt; grows from record to record, also over restarts. */
  get position() { return this.#long(POSITION); }
  #long(field) {
    const words = this.#words();
    return BigInt(words[this.#at + field]) | (BigInt(words[this.#at + field + 1]) << 32n);
  }
  /** How often it failed before, see Stage.fail. */
  get attempts() { return this.#words()[this.#at + ATTEMPTS]; }
  /** Number of the input that it came from. */
  get input() { return this.#words()[this.#at + INPUT]; }
  /** A copy of an attribute by its name; null if there is none. */
  attribute(name) { return check(native.attribute(this.#bytes(ATTRIBUTES_OFFSET, ATTRIBUTES_LEN), bytes(name))); }
}

/** An open stage: iterate over it for its records. */
class Stage {
  #session;
  #mappings = []; // of this batch
  #batchMax = 1;
  #count = 0;
  #next = 0;
  #finished = 0;
  #begin = 0;
  #pendingBytes = 0;
  #current = false;
  #touched = -1; // the last record of this batch that something was emitted or put for
  #over = false;
  #queue = []; // what found no room, in order
  #queueBytes = 0;
  #draining = null;
  constructor(session) {
    this.#session = session;
    this._words = new Uint32Array(native.records(session));
    this._batch = 0;
  }

  _mapping(input) {
    return (this.#mappings[input] ??= check(native.map(this.#session, input)));
  }

  #open() {
    if (!this.#session) throw new AgsError(STATE, 'AGS_STATE', 'the stage is closed');
    if (this.#draining) throw new AgsError(STATE, 'AGS_STATE', 'an emit waits for room: await what emit returns before the next call');
  }

  async #wait() {
    const [status, code, sentence] = await native.wait(this.#session);
    if (status !== 0) throw new AgsError(status, code, sentence);
  }

  /** The next record of this batch, or null. */
  #step() {
    this.#current = false;
    // What is queued belongs to records that are not finished: then this comes at the end of the batch.
    if (this.#pendingBytes >= PENDING_BYTES_MAX && this.#queue.length === 0) this.#flush();
    while (this.#next < this.#count) {
      const at = this.#next++;
      if (this._words[at * RECORD_WORDS + TYPE] !== 0) continue;
      this.#current = true;
      return new Record(this, at, this._batch);
    }
    return null;
  }

  #flush() {
    if (this.#next > this.#finished) check(native.done(this.#session, this.#next - this.#finished));
    this.#finished = this.#next;
    this.#pendingBytes = 0;
  }

  /** The next batch is there; false when the input is over. */
  async #fill() {
    this.#current = false;
    while (this.#queue.length > 0 || this.#draining) await this.#drain();
    if (!this.#session) throw new AgsError(STATE, 'AGS_STATE', 'the stage is closed');
    // A record that was left in the middle of a batch is finished like those before it; the others come first.
    if (this.#next < this.#count) return true;
    if (this.#over) {
      this.#flush();
      return false;
    }
    this.#release();
    if (this.#count > 0) {
      if (performance.now() - this.#begin > BATCH_MS_MAX) this.#batchMax = Math.max(1, this.#batchMax >> 1);
      else if (this.#count === this.#batchMax) this.#batchMax = Math.min(BATCH_RECORDS_MAX, this.#batchMax * 2);
    }
    let finished = this.#next - this.#finished;
    this.#count = this.#next = this.#finished = this.#pendingBytes = 0;
    this.#touched = -1;
    for (;;) {
      const count = native.fill(this.#session, finished, this.#batchMax);
      finished = 0;
      if (count > 0) {
        this.#count = count;
        this.#begin = performance.now();
        return true;
      }
      if (count === INPUT_OVER || count === CLOSED) {
        this.#over = true;
        return false;
      }
      if (count !== AGAIN) throw failure(count);
      await this.#wait();
    }
  }

  async #fillForNext() {
    for (;;) {
      if (!(await this.#fill())) return { done: true, value: undefined };
      const record = this.#step();
      if (record) return { done: false, value: record };
    }
  }

  [Symbol.asyncIterator]() {
    return {
      next: () => {
        if (this.#next < this.#count && this.#queue.length === 0 && !this.#draining) {
          try {
            const record = this.#step();
            if (record) return Promise.resolve({ done: false, value: record });
          } catch (error) {
            return Promise.reject(error);
          }
        }
        return this.#fillForNext();
      },
    };
  }

  /** Batches of records, each an iterable: `for await (const batch of stage.batches()) for (const record of batch) ...`. */
  async *batches() {
    const batch = { [Symbol.iterator]: () => ({ next: () => {
      const record = this.#step();
      return record ? { done: false, value: record } : { done: true, value: undefined };
    } }) };
    while (await this.#fill()) yield batch;
  }

  /**
   * Emits a record (Buffer, Uint8Array or string) that belongs to the record of the loop; it counts when that one is finished. Key and event
   * time are those of that record unless given; key null: no key. attributes: {name: bytes}. errors: to the error output.
   *
   * Returns undefined, or, when there is no room, a promise that is resolved when there was some: await it.
   */
  emit(payload, { key, eventTimeNs, attributes, errors = false } = {}) {
    if (!this.#session) throw new AgsError(STATE, 'AGS_STATE', 'the stage is closed');
    if (payload === undefined || payload === null) throw new TypeError('argo-streams: a payload is a Buffer, a Uint8Array or a string');
    const record = {
      output: errors ? OUTPUT_ERRORS : OUTPUT_MAIN,
      at: this.#current ? this.#next - 1 : -1,
      keyChoice: key === undefined ? KEY_INHERIT : key === null ? KEY_NONE : KEY_SET,
      key: bytes(key),
      time: eventTimeNs,
      attributes: attributes ? encode(attributes) : undefined,
      payload: bytes(payload),
    };
    if (this.#queue.length === 0 && this.#emitNow(record)) return undefined;
    return this.#later(record);
  }

  /** Sends the record of the loop as it came to the error output. As emit. */
  reject(reason) {
    this.#open();
    if (!this.#current) throw new AgsError(STATE, 'AGS_STATE', 'there is no record to reject outside of the loop over the stage');
    const record = { at: this.#next - 1, reason: Buffer.from(`${String(reason).replaceAll('\0', ' ')}\0`) };
    if (this.#queue.length === 0 && this.#emitNow(record)) return undefined;
    return this.#later(record);
  }

  /**
   * The record of the loop failed, for now: as the step's onError says it comes again later or goes to the error output, and the loop goes on.
   * Before anything was emitted, put or deleted for it. Await it before the loop asks for the next record.
   */
  async fail(reason) {
    // What waits for room belongs to records before this one.
    while (this.#queue.length > 0 || this.#draining) await this.#drain();
    this.#open();
    if (!this.#current) throw new AgsError(STATE, 'AGS_STATE', 'there is no record to fail outside of the loop over the stage');
    if (this.#touched >= this.#next - 1) throw new AgsError(STATE, 'AGS_STATE', 'something was emitted, put or deleted for the record: fail it before');
    // Those before it are finished. If the wait is interrupted, this one comes again.
    this.#current = false;
    this.#next--;
    this.#flush();
    this.#release();
    const text = Buffer.from(`${String(reason).replaceAll('\0', ' ')}\0`);
    let status;
    while ((status = native.fail(this.#session, text)) === AGAIN) await this.#wait();
    check(status);
    // Those behind it were given back, and come again.
    this.#count = this.#next = this.#finished = this.#pendingBytes = 0;
    this.#touched = -1;
  }

  /** Nobody reads what was lent any more. */
  #release() {
    this._batch++;
    for (const mapping of this.#mappings) if (mapping) native.detach(mapping);
    this.#mappings.length = 0;
  }

  /** False: there is no room now. */
  #emitNow(record) {
    // What was queued for a whole batch would fill a ring: the records before this one are finished first. Only while nothing was emitted or
    // put for this one, which would be published with them.
    if (record.at > this.#finished && this.#touched < record.at && this.#pendingBytes >= PENDING_BYTES_MAX) {
      check(native.done(this.#session, record.at - this.#finished));
      this.#finished = record.at;
      this.#pendingBytes = 0;
    }
    for (;;) {
      const nth = record.at < 0 ? -1 : record.at - this.#finished;
      const status = record.reason
        ? native.reject(this.#session, nth, record.reason)
        : native.emit(this.#session, record.output, nth, record.keyChoice, record.key, record.time !== undefined, record.time, record.attributes, record.payload);
      if (status === 0) {
        const len = record.reason ? this._words[record.at * RECORD_WORDS + LEN] : record.payload.byteLength;
        this.#pendingBytes += len + RECORD_HEAD_BYTES;
        this.#touched = Math.max(this.#touched, record.at);
        return true;
      }
      if (status === AGAIN) return false;
      // Last results that fill a ring are published as they come.
      if (status !== BATCH_FULL || record.at >= 0 || this.#next > this.#finished || this.#pendingBytes === 0) throw failure(status);
      check(native.done(this.#session, 0));
      this.#pendingBytes = 0;
    }
  }

  #later(record) {
    const len = record.payload?.byteLength ?? 0;
    if (this.#queueBytes + len > QUEUE_BYTES_MAX && this.#queue.length > 0) {
      throw new AgsError(BATCH_FULL, 'AGS_BATCH_FULL', `more than ${QUEUE_BYTES_MAX} bytes wait for room: await what emit returns`);
    }
    // The caller may use its buffers again.
    if (record.payload) record.payload = Buffer.from(record.payload);
    if (record.key) record.key = Buffer.from(record.key);
    this.#queue.push(record);
    this.#queueBytes += len;
    return this.#drain();
  }

  #drain() {
    this.#draining ??= this.#drainAll().finally(() => {
      this.#draining = null;
    });
    return this.#draining;
  }

  async #drainAll() {
    while (this.#queue.length > 0) {
      if (this.#emitNow(this.#queue[0])) this.#queueBytes -= this.#queue.shift().payload?.byteLength ?? 0;
      else await this.#wait();
    }
  }

  /** A copy of the value of a key in the keyed state, as of the last put; null if there is none. */
  get(key) {
    this.#open();
    return check(native.get(this.#session, bytes(key)));
  }

  /** Sets the value of a key; counts with the record of the loop. */
  put(key, value) {
    this.#open();
    if (value === undefined || value === null) throw new TypeError('argo-streams: a value is a Buffer, a Uint8Array or a string');
    if (this.#current) this.#touched = this.#next - 1;
    check(native.put(this.#session, bytes(key), bytes(value)));
  }

  /** Takes a key away; counts with the record of the loop. */
  delete(key) {
    this.#open();
    if (this.#current) this.#touched = this.#next - 1;
    check(native.put(this.#session, bytes(key), undefined));
  }

  /** All of the keyed state as [key, value], in no order. */
  *items() {
    const cursor = Buffer.alloc(24);
    for (;;) {
      this.#open();
      const batch = check(native.items(this.#session, cursor));
      if (batch.length === 0) return;
      for (let at = 0; at < batch.length; at += 2) yield [batch[at], batch[at + 1]];
    }
  }

  /** Ends the wait that is under way, or the next one, with an error whose code is 'AGS_INTERRUPTED'. */
  interrupt() {
    if (this.#session) native.interrupt(this.#session);
  }

  /** The step's name. */
  get name() { return this.#session ? native.stepName(this.#session) : ''; }

  /** Finishes the stage if its input is over, and frees it; what is not finished comes again, to the next process. */
  async close() {
    if (!this.#session) return;
    if (this.#draining) await this.#draining;
    if (this.#over) {
      while (this.#queue.length > 0) await this.#drain();
      check(native.done(this.#session, 0));
    }
    this.#current = false;
    this.#release();
    native.detach(this._words.buffer);
    const session = this.#session;
    this.#session = null;
    native.close(session);
  }
}

/** PROTOCOL.md, "Attributes": u16 length of the name, u32 length of the value, name, value. */
function encode(attributes) {
  const parts = [];
  for (const [name, value] of Object.entries(attributes)) {
    const [left, right] = [Buffer.from(name), bytes(value)];
    if (left.length > 65535) throw new AgsError(TOO_LARGE, 'AGS_TOO_LARGE', `the name of an attribute has ${left.length} bytes, of at most 65535`);
    const head = Buffer.alloc(6);
    head.writeUInt16LE(left.length, 0);
    head.writeUInt32LE(right.byteLength, 2);
    parts.push(head, left, right);
  }
  const list = Buffer.concat(parts);
  if (list.length > ATTRIBUTES_BYTES_MAX) throw new AgsError(TOO_LARGE, 'AGS_TOO_LARGE', `the attributes have ${list.length} bytes, of at most ${ATTRIBUTES_BYTES_MAX}`);
  return list;
}

/**
 * Opens the stage that the agent keeps for this program, by $AGS_SOCKET; with `transport: auto` before anything is read from standard
 * input. Blocks until the agent has answered, at most 30 s for each question.
 */
function open(socketPath = null) {
  const session = native.open(socketPath);
  return new Stage(check(session));
}

module.exports = { open, Stage, Record, AgsError };
