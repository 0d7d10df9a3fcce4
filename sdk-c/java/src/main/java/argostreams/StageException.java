package argostreams;

/** A call failed. */
public final class StageException extends RuntimeException {
    private static final long serialVersionUID = 1;
    private final int status;

    StageException(int status, String words) {
        super(words);
        this.status = status;
    }

    /** Its number in argo_streams.h. */
    public int status() {
        return status;
    }

    /** Whether {@link Stage#interrupt} ended the wait. */
    public boolean isInterrupted() {
        return status == Native.INTERRUPTED;
    }
}
