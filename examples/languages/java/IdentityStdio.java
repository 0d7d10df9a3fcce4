import java.io.BufferedInputStream;
import java.io.BufferedOutputStream;
import java.io.ByteArrayOutputStream;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.IOException;

/** The identity on standard input and output: argo-streams conform --strict-bytes -- java IdentityStdio.java */
public final class IdentityStdio {
    public static void main(String[] arguments) throws IOException {
        // Bytes: a Reader would change what is no text, and drop carriage returns.
        var in = new BufferedInputStream(System.in, 1 << 16);
        var out = new BufferedOutputStream(new FileOutputStream(FileDescriptor.out), 1 << 16);
        var line = new ByteArrayOutputStream();
        for (int next = in.read(); next >= 0; next = in.read()) {
            line.write(next);
            if (next == '\n') {
                line.writeTo(out);
                line.reset();
                if (in.available() == 0) out.flush(); // nothing more is there: answer before the next read
            }
        }
        line.writeTo(out);
        out.flush();
    }
}
