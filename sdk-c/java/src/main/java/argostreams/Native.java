package argostreams;

import static java.lang.foreign.ValueLayout.ADDRESS;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemoryLayout;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.SymbolLookup;
import java.lang.invoke.MethodHandle;

/** The calls and numbers of argo_streams.h, where each is documented. */
final class Native {
    static final int OK = 0;
    static final int AGAIN = -1;
    static final int BATCH_FULL = -4;
    static final int INTERRUPTED = -5;
    static final int INPUT_OVER = -6;
    static final int INVALID = -20;
    static final int TOO_LARGE = -21;
    static final int STATE = -22;
    static final int CLOSED = -40;
    static final int CLASS_TRY_AGAIN = 1;
    static final int OUTPUT_MAIN = 0;
    static final int OUTPUT_ERRORS = 1;
    static final int KEY_INHERIT = 0;
    static final int KEY_NONE = 1;
    static final int KEY_SET = 2;
    static final int BELONGS_TO_NTH = 1;
    static final int BELONGS_TO_NOTHING = 2;
    static final int EMIT_EVENT_TIME = 1;
    static final int STAGE_TELL_INPUT_OVER = 1;
    static final int CURSOR_OVER = 2;
    static final long FOREVER = -1;

    // Sizes, and where fields lie.
    static final long OPTIONS_BYTES = 24;
    static final long RECORD_BYTES = 128;
    static final long EMIT_BYTES = 80;
    static final long CURSOR_BYTES = 24;
    static final long ENTRY_BYTES = 32;
    static final long BYTES_BYTES = 16;

    private static final MemoryLayout BYTES = MemoryLayout.structLayout(ADDRESS.withName("data"), JAVA_LONG.withName("len_bytes"));
    private static final Linker LINKER = Linker.nativeLinker();
    private static final SymbolLookup LIBRARY = library();

    static final MethodHandle OPEN = call("ags_stage_open", FunctionDescriptor.of(JAVA_INT, ADDRESS, ADDRESS));
    static final MethodHandle CLOSE = call("ags_stage_close", FunctionDescriptor.ofVoid(ADDRESS));
    static final MethodHandle NAME = call("ags_stage_name", FunctionDescriptor.of(ADDRESS, ADDRESS));
    static final MethodHandle MAP = call("ags_stage_map", FunctionDescriptor.of(JAVA_INT, ADDRESS, JAVA_INT, ADDRESS, ADDRESS));
    static final MethodHandle RECV = call("ags_stage_recv", FunctionDescriptor.of(JAVA_INT, ADDRESS, ADDRESS, JAVA_INT, ADDRESS));
    static final MethodHandle DONE = call("ags_stage_done", FunctionDescriptor.of(JAVA_INT, ADDRESS, JAVA_INT));
    static final MethodHandle EMIT = call("ags_stage_emit", FunctionDescriptor.of(JAVA_INT, ADDRESS, JAVA_INT, ADDRESS));
    static final MethodHandle REJECT = call("ags_stage_reject", FunctionDescriptor.of(JAVA_INT, ADDRESS, JAVA_LONG, ADDRESS));
    static final MethodHandle FAIL = call("ags_stage_fail", FunctionDescriptor.of(JAVA_INT, ADDRESS, ADDRESS));
    static final MethodHandle GET = call("ags_stage_get", FunctionDescriptor.of(JAVA_INT, ADDRESS, BYTES, ADDRESS));
    static final MethodHandle PUT = call("ags_stage_put", FunctionDescriptor.of(JAVA_INT, ADDRESS, BYTES, BYTES));
    static final MethodHandle DELETE = call("ags_stage_delete", FunctionDescriptor.of(JAVA_INT, ADDRESS, BYTES));
    static final MethodHandle ITERATE = call("ags_stage_iterate", FunctionDescriptor.of(JAVA_INT, ADDRESS, ADDRESS, ADDRESS, JAVA_INT, ADDRESS, ADDRESS));
    static final MethodHandle WAIT = call("ags_stage_wait", FunctionDescriptor.of(JAVA_INT, ADDRESS, JAVA_LONG));
    static final MethodHandle INTERRUPT = call("ags_stage_interrupt", FunctionDescriptor.of(JAVA_INT, ADDRESS));
    static final MethodHandle FIND = call("ags_attributes_find", FunctionDescriptor.of(JAVA_INT, BYTES, BYTES, ADDRESS));
    private static final MethodHandle STATUS_NAME = call("ags_status_name", FunctionDescriptor.of(ADDRESS, JAVA_INT));
    private static final MethodHandle STATUS_TEXT = call("ags_status_text", FunctionDescriptor.of(ADDRESS, JAVA_INT));
    private static final MethodHandle STATUS_CLASS = call("ags_status_class", FunctionDescriptor.of(JAVA_INT, JAVA_INT));
    private static final MethodHandle LAST_ERROR = call("ags_last_error", FunctionDescriptor.of(ADDRESS));

    private Native() {}

    private static SymbolLookup library() {
        String named = System.getProperty("argostreams.library", System.getenv("AGS_LIBRARY"));
        String[] places = named != null ? new String[] {named} : new String[] {"libargo_streams.so.0", "/usr/local/lib/libargo_streams.so.0"};
        for (String place : places) {
            try {
                return SymbolLookup.libraryLookup(place, Arena.global());
            } catch (IllegalArgumentException missing) {
                // The next one.
            }
        }
        throw new UnsatisfiedLinkError("argo-streams: no library " + String.join(" and no ", places)
                + ": install it (make sdk-install, ldconfig), or name its file by -Dargostreams.library=FILE or AGS_LIBRARY");
    }

    private static MethodHandle call(String name, FunctionDescriptor descriptor) {
        MemorySegment function = LIBRARY.find(name).orElseThrow(() -> new UnsatisfiedLinkError("argo-streams: the library has no " + name + ": it is older than this jar"));
        return LINKER.downcallHandle(function, descriptor);
    }

    static String text(MemorySegment string) {
        return string.reinterpret(Long.MAX_VALUE).getString(0);
    }

    /** The exception of a status, with the sentence that the library left on this thread. */
    static StageException failure(int status) {
        try {
            String sentence = text((MemorySegment) LAST_ERROR.invokeExact());
            boolean isPlain = (int) STATUS_CLASS.invokeExact(status) == CLASS_TRY_AGAIN || sentence.isEmpty();
            String words = isPlain ? text((MemorySegment) STATUS_TEXT.invokeExact(status)) : sentence;
            return new StageException(status, text((MemorySegment) STATUS_NAME.invokeExact(status)) + ": " + words);
        } catch (Throwable thrown) {
            throw broken(thrown);
        }
    }

    /** What a method handle declares; a call of C throws nothing. */
    static RuntimeException broken(Throwable thrown) {
        if (thrown instanceof RuntimeException exception) {
            return exception;
        }
        if (thrown instanceof Error error) {
            throw error;
        }
        return new IllegalStateException(thrown);
    }
}
