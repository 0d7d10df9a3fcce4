package argostreams;

import java.io.ByteArrayOutputStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;

/** How a record is emitted: each method gives one that differs in that. It may be kept and used for many records. */
public final class Emit {
    /** As {@link Stage#emit(byte[])}: key and time of the record of the loop, no attributes, to the main output. */
    public static final Emit DEFAULT = new Emit(Native.KEY_INHERIT, null, false, 0, new byte[0], Native.OUTPUT_MAIN);

    final int keyChoice;
    final byte[] key;
    final boolean hasEventTime;
    final long eventTimeNs;
    final byte[] attributes;
    final int output;

    private Emit(int keyChoice, byte[] key, boolean hasEventTime, long eventTimeNs, byte[] attributes, int output) {
        this.keyChoice = keyChoice;
        this.key = key;
        this.hasEventTime = hasEventTime;
        this.eventTimeNs = eventTimeNs;
        this.attributes = attributes;
        this.output = output;
    }

    /** With this key, at most 64 KiB. */
    public Emit key(byte[] key) {
        return new Emit(Native.KEY_SET, key.clone(), hasEventTime, eventTimeNs, attributes, output);
    }

    /** Without a key. */
    public Emit withoutKey() {
        return new Emit(Native.KEY_NONE, null, hasEventTime, eventTimeNs, attributes, output);
    }

    /** When it happened, ns since 1970. */
    public Emit eventTimeNs(long eventTimeNs) {
        return new Emit(keyChoice, key, true, eventTimeNs, attributes, output);
    }

    /** With one more attribute; all of them together at most 64 KiB. */
    public Emit attribute(String name, byte[] value) {
        byte[] left = name.getBytes(StandardCharsets.UTF_8);
        if (left.length > 65_535) {
            throw new StageException(Native.TOO_LARGE, "AGS_TOO_LARGE: the name of an attribute has " + left.length + " bytes, of at most 65535");
        }
        // PROTOCOL.md, "Attributes": u16 length of the name, u32 length of the value, name, value.
        byte[] head = ByteBuffer.allocate(6).order(ByteOrder.LITTLE_ENDIAN).putShort((short) left.length).putInt(value.length).array();
        ByteArrayOutputStream list = new ByteArrayOutputStream();
        list.writeBytes(attributes);
        list.writeBytes(head);
        list.writeBytes(left);
        list.writeBytes(value);
        return new Emit(keyChoice, key, hasEventTime, eventTimeNs, list.toByteArray(), output);
    }

    /** To the error output. */
    public Emit toErrors() {
        return new Emit(keyChoice, key, hasEventTime, eventTimeNs, attributes, Native.OUTPUT_ERRORS);
    }
}
