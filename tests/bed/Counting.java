import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.concurrent.atomic.AtomicLongArray;
import sun.misc.Signal;

/**
 * A process to checkpoint, as `threads` is one, in a virtual machine: threads that count, memory with a checksum over it, a report at
 * SIGUSR1. At SIGTERM all threads end, are joined, and the last report says so: {@code "ended":true}.
 */
final class Counting {
    private static final int PER_MIB = (1 << 20) / Long.BYTES;

    private final long[][] memory;
    private final Path out;
    private final AtomicLongArray counters;
    private final AtomicBoolean asked = new AtomicBoolean();
    private volatile boolean ending;

    private Counting(int mib, Path out, int threads) {
        this.memory = new long[mib][PER_MIB];
        this.out = out;
        this.counters = new AtomicLongArray(threads);
    }

    public static void main(String[] args) throws IOException, InterruptedException {
        int mib = 1;
        int threads = 16;
        Path out = null;
        for (int i = 0; i + 1 < args.length; i += 2) {
            switch (args[i]) {
                case "--mib" -> mib = Integer.parseInt(args[i + 1]);
                case "--out" -> out = Path.of(args[i + 1]);
                case "--threads" -> threads = Integer.parseInt(args[i + 1]);
                default -> throw new IllegalArgumentException(args[i]);
            }
        }
        new Counting(mib, out, threads).run();
    }

    private void run() throws IOException, InterruptedException {
        fill();
        Signal.handle(new Signal("USR1"), signal -> asked.set(true));
        Signal.handle(new Signal("TERM"), signal -> ending = true);
        List<Thread> threads = new ArrayList<>();
        for (int number = 0; number < counters.length(); number++) {
            int own = number;
            Thread thread = new Thread(() -> count(own));
            thread.start();
            threads.add(thread);
        }
        report(false);
        while (!ending) {
            Thread.sleep(1);
            if (asked.getAndSet(false)) {
                report(false);
            }
        }
        for (Thread thread : threads) {
            thread.join();
        }
        report(true);
    }

    private void count(int number) {
        while (!ending) {
            try {
                Thread.sleep(5);
            } catch (InterruptedException e) {
                throw new IllegalStateException(e);
            }
            counters.incrementAndGet(number);
        }
    }

    private void fill() {
        long state = 0x9e3779b97f4a7c15L;
        for (long[] part : memory) {
            for (int i = 0; i < part.length; i++) {
                state ^= state << 13;
                state ^= state >>> 7;
                state ^= state << 17;
                part[i] = state;
            }
        }
    }

    private long checksum() {
        long sum = 1;
        for (long[] part : memory) {
            for (long word : part) {
                sum = Long.rotateLeft((sum ^ word) * 0x9e3779b185ebca87L, 29);
            }
        }
        return sum;
    }

    /** Replaces the report in one step: who finds it finds all of it. */
    private void report(boolean ended) throws IOException {
        long slowest = Long.MAX_VALUE;
        for (int number = 0; number < counters.length(); number++) {
            slowest = Math.min(slowest, counters.get(number));
        }
        String line = String.format(
                "{\"pid\":%d,\"counter\":%d,\"checksum\":\"%016x\",\"changed\":0,\"ended\":%b,\"ready\":true}%n",
                ProcessHandle.current().pid(), slowest, checksum(), ended);
        Path next = out.resolveSibling(out.getFileName() + ".tmp");
        Files.writeString(next, line);
        Files.move(next, out, StandardCopyOption.ATOMIC_MOVE);
    }
}
