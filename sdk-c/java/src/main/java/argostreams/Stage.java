package argostreams;

import static java.lang.foreign.ValueLayout.ADDRESS;
import static java.lang.foreign.ValueLayout.JAVA_BYTE;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.nio.charset.StandardCharsets;
import java.util.ArrayDeque;
import java.util.Arrays;
import java.util.Iterator;
import java.util.Map;
import java.util.NoSuchElementException;

/**
 * The stage of this program, as an iteration over its records:
 *
 * <pre>{@code
 * try (var stage = Stage.open()) {
 *     for (var record : stage) stage.emit(record.payload());
 * }
 * }</pre>
 *
 * <p>A record is finished when the loop asks for the next one; what was emitted and put for it counts together with that. Records are
 * received and finished in batches; a batch is as long as what 1 ms of work was before, so that a slow program still finishes each record by
 * itself.
 *
 * <p>A payload is a MemorySegment over shared memory, read-only, good until the loop asks for the next record. When it is given back, which
 * is at the end of its batch at the latest, a kept one throws IllegalStateException.
 *
 * <p>A stage belongs to the thread that iterates over it; only {@link #interrupt} may come from another. If the loop is left by an
 * exception, what was not finished comes again, to the next process.
 */
public final class Stage implements Iterable<Stage.Record>, AutoCloseable {
    private static final int BATCH_RECORDS_MAX = 256;
    /** Far from what fills the shortest ring (256 KiB), so that the outputs of one more record have room. */
    private static final long PENDING_BYTES_MAX = 32 * 1024;
    /** A batch that took longer is followed by a shorter one. */
    private static final long BATCH_NS_MAX = 1_000_000;
    /** What a record takes in a ring beside its payload. */
    private static final long RECORD_HEAD_BYTES = 64;
    private static final int ENTRIES_MAX = 64;

    private final Arena memory = Arena.ofAuto();
    private final MemorySegment records = memory.allocate(BATCH_RECORDS_MAX * Native.RECORD_BYTES, 8);
    private final MemorySegment emit = memory.allocate(Native.EMIT_BYTES, 8);
    private final MemorySegment key = memory.allocate(Native.BYTES_BYTES, 8);
    private final MemorySegment value = memory.allocate(Native.BYTES_BYTES, 8);
    private final MemorySegment out = memory.allocate(16, 8);
    private final Scratch keyBytes = new Scratch();
    private final Scratch valueBytes = new Scratch();
    private final Scratch attributeBytes = new Scratch();

    /** NULL: closed. Written under this object's lock, because of {@link #interrupt}. */
    private MemorySegment stage;
    /** What is lent to the program until the next {@link #flush}; null: nothing is. */
    private Arena lent;
    private MemorySegment[] mappings = new MemorySegment[1];
    private int batchMax = 1;
    private int count;
    private int next;
    private int finished;
    private long beginNs;
    private long pendingBytes;
    private boolean hasCurrent;
    /** Something was emitted or put for the current record. */
    private boolean isTouched;
    private boolean isOver;
    private boolean hasLoopFailed;

    private Stage(MemorySegment stage) {
        this.stage = stage;
    }

    /**
     * Opens the stage that the agent keeps for this program, by $AGS_SOCKET; with {@code transport: auto} before anything is read from
     * standard input. Blocks until the agent has answered, at most 30 s for each question.
     */
    public static Stage open() {
        return open(null);
    }

    /** As {@link #open()}, at this socket. */
    public static Stage open(String socketPath) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment options = arena.allocate(Native.OPTIONS_BYTES, 8);
            options.set(JAVA_INT, 0, (int) Native.OPTIONS_BYTES);
            options.set(JAVA_INT, 4, Native.STAGE_TELL_INPUT_OVER);
            options.set(ADDRESS, 8, socketPath == null ? MemorySegment.NULL : arena.allocateFrom(socketPath));
            MemorySegment stageOut = arena.allocate(ADDRESS);
            check((int) Native.OPEN.invokeExact(options, stageOut));
            return new Stage(stageOut.get(ADDRESS, 0));
        } catch (Throwable thrown) {
            throw Native.broken(thrown);
        }
    }

    private static void check(int status) {
        if (status != Native.OK) {
            throw Native.failure(status);
        }
    }

    private MemorySegment opened() {
        if (stage == null) {
            throw new StageException(Native.STATE, "AGS_STATE: the stage is closed");
        }
        return stage;
    }

    /** A record that was received; good until the loop asks for the next one. */
    public static final class Record {
        private final MemorySegment record;
        private final MemorySegment mapping;

        private Record(MemorySegment record, MemorySegment mapping) {
            this.record = record;
            this.mapping = mapping;
        }

        private MemorySegment fields() {
            if (!mapping.scope().isAlive()) {
                throw new IllegalStateException("the record is finished: copy what is needed longer");
            }
            return record;
        }

        /** The payload, in shared memory. */
        public MemorySegment payload() {
            return mapping.asSlice(record.get(JAVA_LONG, 0), record.get(JAVA_LONG, 8));
        }

        /** A copy of the payload. */
        public byte[] bytes() {
            return payload().toArray(JAVA_BYTE);
        }

        /** The key, in shared memory; null without one. */
        public MemorySegment key() {
            return (fields().get(JAVA_INT, 104) & 1) == 0 ? null : mapping.asSlice(record.get(JAVA_LONG, 16), record.get(JAVA_LONG, 24));
        }

        /** A copy of an attribute by its name; null if there is none. */
        public byte[] attribute(String name) {
            long len = fields().get(JAVA_LONG, 48);
            if (len == 0) {
                return null;
            }
            try (Arena arena = Arena.ofConfined()) {
                byte[] wanted = name.getBytes(StandardCharsets.UTF_8);
                MemorySegment found = arena.allocate(Native.BYTES_BYTES, 8);
                MemorySegment list = pair(arena, mapping.asSlice(record.get(JAVA_LONG, 40), len));
                check((int) Native.FIND.invokeExact(list, pair(arena, arena.allocateFrom(JAVA_BYTE, wanted)), found));
                return copy(found, 0);
            } catch (Throwable thrown) {
                throw Native.broken(thrown);
            }
        }

        /** When it happened, ns since 1970. */
        public long eventTimeNs() {
            return fields().get(JAVA_LONG, 56);
        }

        /** Its place in its input; grows from record to record, also over restarts. */
        public long position() {
            return fields().get(JAVA_LONG, 72);
        }

        /** How often it failed before, see {@link Stage#fail}. */
        public int attempts() {
            return fields().get(JAVA_INT, 120);
        }

        /** Number of the input that it came from. */
        public int input() {
            return fields().get(JAVA_INT, 96);
        }
    }

    private static MemorySegment pair(Arena arena, MemorySegment bytes) {
        MemorySegment pair = arena.allocate(Native.BYTES_BYTES, 8);
        pair.set(ADDRESS, 0, bytes);
        pair.set(JAVA_LONG, 8, bytes.byteSize());
        return pair;
    }

    /** A copy of the ags_bytes at this place; null if it is none. */
    private static byte[] copy(MemorySegment from, long at) {
        MemorySegment data = from.get(ADDRESS, at);
        return data.address() == 0 ? null : data.reinterpret(from.get(JAVA_LONG, at + 8)).toArray(JAVA_BYTE);
    }

    /** Memory of C's for bytes of Java's; it grows and is used again. */
    private final class Scratch {
        private MemorySegment room = memory.allocate(256);

        MemorySegment of(byte[] bytes) {
            if (room.byteSize() < bytes.length) {
                room = Arena.ofAuto().allocate(Math.max(bytes.length, room.byteSize() * 2));
            }
            MemorySegment.copy(bytes, 0, room, JAVA_BYTE, 0, bytes.length);
            return room;
        }
    }

    private static void set(MemorySegment pair, long at, MemorySegment bytes, long len) {
        pair.set(ADDRESS, at, bytes);
        pair.set(JAVA_LONG, at + 8, len);
    }

    /** The records, once: a second iteration goes on where the first one ended. */
    @Override
    public Iterator<Record> iterator() {
        return new Iterator<>() {
            private Record ahead;

            @Override
            public boolean hasNext() {
                if (ahead == null) {
                    ahead = advance();
                }
                return ahead != null;
            }

            @Override
            public Record next() {
                if (!hasNext()) {
                    throw new NoSuchElementException("the input is over");
                }
                Record record = ahead;
                ahead = null;
                return record;
            }
        };
    }

    /** Finishes the record before and takes the next one; null when the input is over. */
    private Record advance() {
        opened();
        hasCurrent = false;
        hasLoopFailed = true;
        if (pendingBytes >= PENDING_BYTES_MAX) {
            flush();
        }
        for (;;) {
            if (next == count) {
                flush();
                if (isOver || !fill()) {
                    hasLoopFailed = false;
                    return null;
                }
            }
            MemorySegment record = records.asSlice(next * Native.RECORD_BYTES, Native.RECORD_BYTES);
            if (record.get(JAVA_INT, 100) == 0) {
                MemorySegment mapping = mapping(record.get(JAVA_INT, 96));
                next++;
                hasCurrent = true;
                isTouched = false;
                hasLoopFailed = false;
                return new Record(record, mapping);
            }
            next++;
        }
    }

    private void flush() {
        if (lent != null) {
            lent.close();
            lent = null;
            Arrays.fill(mappings, null);
        }
        if (next > finished) {
            done(next - finished);
        }
        finished = next;
        pendingBytes = 0;
    }

    private void done(int records) {
        try {
            check((int) Native.DONE.invokeExact(stage, records));
        } catch (Throwable thrown) {
            throw Native.broken(thrown);
        }
    }

    private boolean fill() {
        if (count > 0) {
            if (System.nanoTime() - beginNs > BATCH_NS_MAX) {
                batchMax = Math.max(1, batchMax / 2);
            } else if (count == batchMax) {
                batchMax = Math.min(BATCH_RECORDS_MAX, batchMax * 2);
            }
            count = 0;
            next = 0;
            finished = 0;
        }
        try {
            for (;;) {
                int status = (int) Native.RECV.invokeExact(stage, records, batchMax, out);
                switch (status) {
                    case Native.OK -> {
                        count = out.get(JAVA_INT, 0);
                        beginNs = System.nanoTime();
                        return true;
                    }
                    case Native.INPUT_OVER, Native.CLOSED -> {
                        isOver = true;
                        return false;
                    }
                    case Native.AGAIN -> await();
                    default -> throw Native.failure(status);
                }
            }
        } catch (Throwable thrown) {
            throw Native.broken(thrown);
        }
    }

    private void await() throws Throwable {
        check((int) Native.WAIT.invokeExact(stage, Native.FOREVER));
    }

    /** Where the records of an input lie, for the time that they are lent. */
    private MemorySegment mapping(int input) {
        if (lent == null) {
            lent = Arena.ofConfined();
        }
        if (input >= mappings.length) {
            mappings = Arrays.copyOf(mappings, input + 1);
        }
        if (mappings[input] == null) {
            try {
                check((int) Native.MAP.invokeExact(stage, input, out, out.asSlice(8)));
            } catch (Throwable thrown) {
                throw Native.broken(thrown);
            }
            mappings[input] = out.get(ADDRESS, 0).reinterpret(out.get(JAVA_LONG, 8), lent, null).asReadOnly();
        }
        return mappings[input];
    }

    /** Emits a record that belongs to the record of the loop, and has its key and time. Blocks while there is no room. */
    public void emit(byte[] payload) {
        emit(payload, Emit.DEFAULT);
    }

    /** As {@link #emit(byte[])}, from memory without a copy of ours if it is native, such as a record's payload. */
    public void emit(MemorySegment payload) {
        emit(payload, Emit.DEFAULT);
    }

    /** With another key or time, with attributes, or to the error output. */
    public void emit(byte[] payload, Emit how) {
        emitBytes(valueBytes.of(payload), payload.length, how);
    }

    /** With another key or time, with attributes, or to the error output. */
    public void emit(MemorySegment payload, Emit how) {
        if (!payload.isNative()) {
            emit(payload.toArray(JAVA_BYTE), how);
            return;
        }
        if (!payload.scope().isAlive()) {
            throw new IllegalStateException("the payload's memory was given back: a record is finished when the loop asks for the next one");
        }
        emitBytes(payload, payload.byteSize(), how);
    }

    private void emitBytes(MemorySegment payload, long len, Emit how) {
        opened();
        emit.set(JAVA_INT, 0, (int) Native.EMIT_BYTES);
        emit.set(JAVA_INT, 4, how.hasEventTime ? Native.EMIT_EVENT_TIME : 0);
        emit.set(JAVA_INT, 8, hasCurrent ? Native.BELONGS_TO_NTH : Native.BELONGS_TO_NOTHING);
        emit.set(JAVA_INT, 12, how.keyChoice);
        emit.set(JAVA_LONG, 16, nth());
        emit.set(JAVA_LONG, 24, how.eventTimeNs);
        if (how.keyChoice == Native.KEY_SET) {
            set(emit, 32, keyBytes.of(how.key), how.key.length);
        }
        if (how.attributes.length > 0) {
            set(emit, 48, attributeBytes.of(how.attributes), how.attributes.length);
        } else {
            emit.set(JAVA_LONG, 56, 0);
        }
        set(emit, 64, payload, len);
        try {
            for (;;) {
                int status = (int) Native.EMIT.invokeExact(stage, how.output, emit);
                if (status == Native.OK) {
                    pendingBytes += len + RECORD_HEAD_BYTES;
                    isTouched = true;
                    return;
                }
                if (status == Native.BATCH_FULL && !hasCurrent && next == finished && pendingBytes > 0) {
                    done(0);
                    pendingBytes = 0;
                } else if (status == Native.AGAIN) {
                    await();
                } else {
                    throw Native.failure(status);
                }
            }
        } catch (Throwable thrown) {
            throw Native.broken(thrown);
        }
    }

    private long nth() {
        return hasCurrent ? next - 1 - finished : 0;
    }

    /** Sends the record of the loop as it came to the error output, with the reason as an attribute. */
    public void reject(String reason) {
        opened();
        if (!hasCurrent) {
            throw new StageException(Native.STATE, "AGS_STATE: there is no record to reject outside of the loop over the stage");
        }
        byte[] text = (reason.replace('\0', ' ') + '\0').getBytes(StandardCharsets.UTF_8);
        MemorySegment string = valueBytes.of(text);
        try {
            int status;
            while ((status = (int) Native.REJECT.invokeExact(stage, nth(), string)) == Native.AGAIN) {
                await();
            }
            check(status);
        } catch (Throwable thrown) {
            throw Native.broken(thrown);
        }
        pendingBytes += records.get(JAVA_LONG, (next - 1) * Native.RECORD_BYTES + 8) + RECORD_HEAD_BYTES;
        isTouched = true;
    }

    /**
     * The record of the loop failed, for now: as the step's onError says it comes again later or goes to the error output, and the loop goes
     * on. Before anything was emitted, put or deleted for it. Blocks while the error output is full.
     */
    public void fail(String reason) {
        opened();
        if (!hasCurrent || isTouched) {
            throw new StageException(Native.STATE, hasCurrent ? "AGS_STATE: something was emitted, put or deleted for the record: fail it before"
                    : "AGS_STATE: there is no record to fail outside of the loop over the stage");
        }
        // Those before it are finished. If the wait is interrupted, this one comes again.
        hasCurrent = false;
        next--;
        flush();
        MemorySegment string = valueBytes.of((reason.replace('\0', ' ') + '\0').getBytes(StandardCharsets.UTF_8));
        try {
            int status;
            while ((status = (int) Native.FAIL.invokeExact(stage, string)) == Native.AGAIN) {
                await();
            }
            check(status);
        } catch (Throwable thrown) {
            throw Native.broken(thrown);
        }
        // Those behind it were given back, and come again.
        count = 0;
        next = 0;
        finished = 0;
    }

    /** A copy of the value of a key in the keyed state, as of the last put; null if there is none. */
    public byte[] get(byte[] key) {
        opened();
        set(this.key, 0, keyBytes.of(key), key.length);
        try {
            check((int) Native.GET.invokeExact(stage, this.key, value));
        } catch (Throwable thrown) {
            throw Native.broken(thrown);
        }
        return copy(value, 0);
    }

    /** Sets the value of a key; counts with the record of the loop. Blocks while the state grows, which is rare. */
    public void put(byte[] key, byte[] value) {
        opened();
        isTouched = true;
        set(this.key, 0, keyBytes.of(key), key.length);
        set(this.value, 0, valueBytes.of(value), value.length);
        try {
            int status;
            while ((status = (int) Native.PUT.invokeExact(stage, this.key, this.value)) == Native.AGAIN) {
                await();
            }
            check(status);
        } catch (Throwable thrown) {
            throw Native.broken(thrown);
        }
    }

    /** Takes a key away; counts with the record of the loop. */
    public void delete(byte[] key) {
        opened();
        isTouched = true;
        set(this.key, 0, keyBytes.of(key), key.length);
        try {
            int status;
            while ((status = (int) Native.DELETE.invokeExact(stage, this.key)) == Native.AGAIN) {
                await();
            }
            check(status);
        } catch (Throwable thrown) {
            throw Native.broken(thrown);
        }
    }

    /** All of the keyed state, copied a batch at a time, in no order. Put and delete as you like meanwhile. */
    public Iterable<Map.Entry<byte[], byte[]>> items() {
        return () -> new Iterator<>() {
            private final MemorySegment cursor = memory.allocate(Native.CURSOR_BYTES, 8);
            private final MemorySegment entries = memory.allocate(ENTRIES_MAX * Native.ENTRY_BYTES, 8);
            private final ArrayDeque<Map.Entry<byte[], byte[]>> batch = new ArrayDeque<>();

            @Override
            public boolean hasNext() {
                cursor.set(JAVA_INT, 0, (int) Native.CURSOR_BYTES);
                while (batch.isEmpty() && (cursor.get(JAVA_INT, 4) & Native.CURSOR_OVER) == 0) {
                    try {
                        check((int) Native.ITERATE.invokeExact(opened(), cursor, entries, ENTRIES_MAX, out, cursor));
                    } catch (Throwable thrown) {
                        throw Native.broken(thrown);
                    }
                    for (int at = 0; at < out.get(JAVA_INT, 0); at++) {
                        long place = at * Native.ENTRY_BYTES;
                        batch.add(Map.entry(copy(entries, place), copy(entries, place + 16)));
                    }
                }
                return !batch.isEmpty();
            }

            @Override
            public Map.Entry<byte[], byte[]> next() {
                if (!hasNext()) {
                    throw new NoSuchElementException("there are no more keys");
                }
                return batch.remove();
            }
        };
    }

    /** Ends the wait that is under way, or the next one, with an exception that {@code isInterrupted}. From any thread. */
    public synchronized void interrupt() {
        if (stage != null) {
            try {
                check((int) Native.INTERRUPT.invokeExact(stage));
            } catch (Throwable thrown) {
                throw Native.broken(thrown);
            }
        }
    }

    /** The step's name. */
    public String name() {
        try {
            return Native.text((MemorySegment) Native.NAME.invokeExact(opened()));
        } catch (Throwable thrown) {
            throw Native.broken(thrown);
        }
    }

    /**
     * Publishes the end of the stage: everything is done. Call it as the last thing of a program whose loop ran to its end; {@link #close}
     * alone cannot know whether what came behind the loop went well.
     */
    public void finish() {
        opened();
        if (!isOver || hasLoopFailed) {
            throw new StageException(Native.STATE, "AGS_STATE: the input is not over: finish is for the end of a program");
        }
        done(0);
        free(true);
    }

    /**
     * Frees the stage. What is not finished comes again, to the program's next process; so does the end of the input, unless
     * {@link #finish} was called.
     */
    @Override
    public void close() {
        if (stage != null) {
            free(!isOver);
        }
    }

    private void free(boolean closes) {
        hasCurrent = false;
        if (lent != null) {
            lent.close();
            lent = null;
        }
        MemorySegment closed;
        synchronized (this) {
            closed = stage;
            stage = null;
        }
        // Once the input is over, a close publishes the end.
        if (closes) {
            try {
                Native.CLOSE.invokeExact(closed);
            } catch (Throwable thrown) {
                throw Native.broken(thrown);
            }
        }
    }
}
