/* N1 in C: a line of JSON in, a running sum for each licenseId, a line out. n1 HOW [one]
 *
 *   lines    standard input to standard output, or $AGS_INPUT to $AGS_OUTPUT (transport: fifo); `one` writes each line by itself
 *   socket   frames over $AGS_RECORDS (transport: socket)
 *   file     batches from $AGS_INPUT_DIRECTORY to $AGS_OUTPUT_DIRECTORY (transport: file)
 *   http     HTTP/1.1 on $PORT (transport: http), a record or several a request
 *   shm      the C library; `one` receives and finishes each record by itself
 *   terminal COMMAND...   reads what the command writes to a raw pseudo-terminal, and counts it: the bare end of one
 */
#define _GNU_SOURCE
#include <argo_streams.h>
#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pty.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define SLOTS (1u << 15)
static struct { char key[24]; size_t len; long sum; } table[SLOTS];

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* The output of one record; its length. */
static int step(const char *line, size_t len, char *out, size_t room)
{
    const char *key = memmem(line, len, "\"licenseId\":\"", 13);
    const char *amount = memmem(line, len, "\"amount\":", 9);
    if (!key || !amount) {
        fprintf(stderr, "no licenseId or amount in: %.*s\n", (int)len, line);
        exit(1);
    }
    key += 13;
    const char *end = memchr(key, '"', (size_t)(line + len - key));
    size_t key_len = end ? (size_t)(end - key) : 0;
    if (key_len == 0 || key_len > sizeof table[0].key)
        exit(1);
    unsigned hash = 2166136261u;
    for (size_t i = 0; i < key_len; i++)
        hash = (hash ^ (unsigned char)key[i]) * 16777619u;
    unsigned slot = hash % SLOTS;
    while (table[slot].len && (table[slot].len != key_len || memcmp(table[slot].key, key, key_len)))
        slot = (slot + 1) % SLOTS;
    if (!table[slot].len) {
        memcpy(table[slot].key, key, key_len);
        table[slot].len = key_len;
    }
    long number = 0;
    for (const char *digit = amount + 9; digit < line + len && *digit >= '0' && *digit <= '9'; digit++)
        number = number * 10 + (*digit - '0');
    table[slot].sum += number;
    /* Not snprintf, which would cost more than all the rest. */
    char digits[24];
    int at = sizeof digits;
    long rest = table[slot].sum;
    do
        digits[--at] = (char)('0' + rest % 10);
    while (rest /= 10);
    size_t digits_len = sizeof digits - (size_t)at;
    if (14 + key_len + 8 + digits_len + 1 > room)
        exit(1);
    char *to = mempcpy(out, "{\"licenseId\":\"", 14);
    to = mempcpy(to, key, key_len);
    to = mempcpy(to, "\",\"sum\":", 8);
    to = mempcpy(to, digits + at, digits_len);
    *to++ = '}';
    return (int)(to - out);
}

static int lines(FILE *in, FILE *out, int one)
{
    char *line = NULL, answer[256];
    size_t room = 0;
    ssize_t len;
    while ((len = getline(&line, &room, in)) > 0) {
        int answer_len = step(line, (size_t)len, answer, sizeof answer - 1);
        answer[answer_len++] = '\n';
        fwrite_unlocked(answer, 1, (size_t)answer_len, out);
        if (one)
            fflush(out);
    }
    return fflush(out);
}

static int file(void)
{
    const char *from = getenv("AGS_INPUT_DIRECTORY"), *to = getenv("AGS_OUTPUT_DIRECTORY");
    if (!from || !to)
        return 1;
    for (;;) {
        DIR *directory = opendir(from);
        if (!directory)
            return 0;
        struct dirent *entry;
        int found = 0;
        while ((entry = readdir(directory))) {
            if (entry->d_name[0] == '.')
                continue;
            char in_path[4096], out_path[4096], made[4100];
            snprintf(in_path, sizeof in_path, "%s/%s", from, entry->d_name);
            snprintf(out_path, sizeof out_path, "%s/%s", to, entry->d_name);
            snprintf(made, sizeof made, "%s.tmp", out_path);
            FILE *in = fopen(in_path, "r"), *out = fopen(made, "w");
            if (!in || !out || lines(in, out, 0) || fclose(out) || rename(made, out_path) || unlink(in_path))
                die(in_path);
            fclose(in);
            found = 1;
        }
        closedir(directory);
        if (!found)
            usleep(500);
    }
}

static void write_all(int to, const char *bytes, size_t len)
{
    while (len) {
        ssize_t wrote = write(to, bytes, len);
        if (wrote <= 0)
            die("write");
        bytes += wrote;
        len -= (size_t)wrote;
    }
}

static int over_socket(void)
{
    const char *path = getenv("AGS_RECORDS");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (!path || strlen(path) >= sizeof address.sun_path)
        return 1;
    strcpy(address.sun_path, path);
    int to = socket(AF_UNIX, SOCK_STREAM, 0);
    if (to < 0 || connect(to, (struct sockaddr *)&address, sizeof address))
        die(path);
    static char in[1 << 20], out[1 << 20];
    size_t have = 0, made = 0;
    for (;;) {
        ssize_t got = read(to, in + have, sizeof in - have);
        if (got <= 0)
            return got < 0;
        have += (size_t)got;
        size_t at = 0;
        uint32_t len;
        while (have - at >= 4 && (memcpy(&len, in + at, 4), have - at - 4 >= len)) {
            uint32_t key_len, attributes_len;
            memcpy(&key_len, in + at + 24, 4);
            memcpy(&attributes_len, in + at + 28, 4);
            size_t head = 32 + (size_t)key_len + attributes_len;
            char *answer = out + made;
            int answer_len = step(in + at + head, 4 + len - head, answer + 32, 256);
            memset(answer, 0, 32);
            uint32_t frame_len = 28 + (uint32_t)answer_len;
            memcpy(answer, &frame_len, 4);
            answer[4] = 4;
            memcpy(answer + 8, in + at + 8, 8);
            made += 32 + (size_t)answer_len;
            at += 4 + len;
            if (made > sizeof out - 1024) {
                write_all(to, out, made);
                made = 0;
            }
        }
        memmove(in, in + at, have - at);
        have -= at;
        write_all(to, out, made);
        made = 0;
    }
}

#define CONNECTIONS 64
#define REQUEST_BYTES (1u << 20)

/* Answers the requests that are whole; how many bytes of them are over. */
static size_t answer_requests(int to, char *in, size_t have)
{
    static char body[REQUEST_BYTES];
    size_t at = 0;
    const char *end;
    while ((end = memmem(in + at, have - at, "\r\n\r\n", 4))) {
        char *head = in + at;
        size_t head_len = (size_t)(end - head) + 4, len = 0, made = 0;
        in[at + head_len - 1] = 0;
        const char *length = strcasestr(head, "\r\nContent-Length:");
        if (length)
            len = strtoul(length + 17, NULL, 10);
        int is_batch = strcasestr(head, "\r\nAgs-Records:") != NULL, is_post = !strncmp(head, "POST", 4);
        in[at + head_len - 1] = '\n';
        if (have - at - head_len < len)
            break;
        const char *line = head + head_len, *over = line + len;
        while (is_post && line < over) {
            const char *newline = is_batch ? memchr(line, '\n', (size_t)(over - line)) : NULL;
            const char *next = newline ? newline + 1 : over;
            if (sizeof body - made < 512)
                exit(1);
            if (is_batch)
                made += (size_t)sprintf(body + made, "{\"value\":");
            made += (size_t)step(line, (size_t)(next - line), body + made, 256);
            if (is_batch)
                made += (size_t)sprintf(body + made, "}\n");
            line = next;
        }
        char answer[128];
        int answer_len = snprintf(answer, sizeof answer, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n\r\n", made);
        struct iovec parts[2] = {{answer, (size_t)answer_len}, {body, made}};
        if (writev(to, parts, 2) != answer_len + (ssize_t)made)
            exit(1);
        at += head_len + len;
    }
    return at;
}

static void http(void)
{
    const char *port = getenv("PORT");
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port ? port : "")), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, CONNECTIONS))
        die("PORT");
    struct pollfd looks[CONNECTIONS] = {{listener, POLLIN, 0}};
    static struct { char *bytes; size_t have; } buffers[CONNECTIONS];
    int count = 1;
    for (;;) {
        if (poll(looks, (nfds_t)count, -1) < 0)
            die("poll");
        for (int i = count - 1; i > 0; i--) {
            if (!looks[i].revents)
                continue;
            ssize_t got = read(looks[i].fd, buffers[i].bytes + buffers[i].have, REQUEST_BYTES - buffers[i].have);
            if (got <= 0) {
                close(looks[i].fd);
                free(buffers[i].bytes);
                count--;
                looks[i] = looks[count];
                buffers[i] = buffers[count];
                continue;
            }
            buffers[i].have += (size_t)got;
            size_t over = answer_requests(looks[i].fd, buffers[i].bytes, buffers[i].have);
            buffers[i].have -= over;
            memmove(buffers[i].bytes, buffers[i].bytes + over, buffers[i].have);
        }
        if (looks[0].revents && count < CONNECTIONS) {
            looks[count] = (struct pollfd){accept(listener, NULL, NULL), POLLIN, 0};
            setsockopt(looks[count].fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
            buffers[count].have = 0;
            buffers[count].bytes = malloc(REQUEST_BYTES);
            if (looks[count].fd < 0 || !buffers[count].bytes)
                die("accept");
            count++;
        }
    }
}

static void check(const char *what, ags_status status)
{
    if (status != AGS_OK) {
        fprintf(stderr, "n1: %s: %s: %s\n", what, ags_status_name(status), ags_last_error());
        exit(1);
    }
}

static int shm(int one)
{
    ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
    ags_stage *stage = NULL;
    check("open", ags_stage_open(&options, &stage));
    static ags_record records[256];
    const char *base = NULL;
    uint64_t mapped_input = UINT64_MAX, mapped_generation = UINT64_MAX;
    for (;;) {
        uint32_t count = 0;
        ags_status status = ags_stage_recv(stage, records, one ? 1 : 256, &count);
        if (status == AGS_CLOSED)
            break;
        if (status == AGS_AGAIN) {
            check("wait", ags_stage_wait(stage, AGS_FOREVER));
            continue;
        }
        check("recv", status);
        for (uint32_t i = 0; i < count; i++) {
            const ags_record *record = &records[i];
            if (record->type == AGS_RECORD_DATA) {
                if (record->input != mapped_input || record->generation != mapped_generation) {
                    const void *address = NULL;
                    uint64_t len_bytes = 0;
                    check("map", ags_stage_map(stage, record->input, &address, &len_bytes));
                    base = address;
                    mapped_input = record->input;
                    mapped_generation = record->generation;
                }
                char answer[256];
                ags_emit emit = AGS_EMIT_INIT;
                emit.payload.len_bytes = (uint64_t)step(base + record->offset, record->len_bytes, answer, sizeof answer);
                emit.payload.data = answer;
                emit.flags = AGS_EMIT_FINISHES;
                while ((status = ags_stage_emit(stage, AGS_OUTPUT_MAIN, &emit)) == AGS_AGAIN)
                    check("wait", ags_stage_wait(stage, AGS_FOREVER));
                check("emit", status);
            } else {
                check("done", ags_stage_done(stage, 1));
            }
        }
    }
    ags_stage_close(stage);
    return 0;
}

static int terminal(char **command)
{
    int ours, theirs;
    struct termios settings;
    if (openpty(&ours, &theirs, NULL, NULL, NULL) || tcgetattr(theirs, &settings))
        die("openpty");
    cfmakeraw(&settings);
    tcsetattr(theirs, TCSANOW, &settings);
    pid_t child = fork();
    if (child == 0) {
        dup2(theirs, 1);
        close(ours);
        close(theirs);
        execvp(command[0], command);
        die(command[0]);
    }
    close(theirs);
    close(0);
    static char block[64 << 10];
    long count = 0;
    ssize_t got;
    while ((got = read(ours, block, sizeof block)) > 0)
        for (const char *at = block; (at = memchr(at, '\n', (size_t)(block + got - at))); at++)
            count++;
    int status = 1;
    waitpid(child, &status, 0);
    printf("%ld\n", count);
    return status != 0;
}

int main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "";
    int one = argc > 2 && !strcmp(argv[2], "one");
    if (!strcmp(how, "terminal") && argc > 2)
        return terminal(argv + 2);
    if (!strcmp(how, "socket"))
        return over_socket();
    if (!strcmp(how, "http"))
        http();
    if (!strcmp(how, "file"))
        return file();
    if (!strcmp(how, "shm"))
        return shm(one);
    if (!strcmp(how, "lines")) {
        const char *in = getenv("AGS_INPUT"), *out = getenv("AGS_OUTPUT");
        FILE *from = in ? fopen(in, "r") : stdin, *to = out ? fopen(out, "w") : stdout;
        if (!from || !to)
            die(in);
        return lines(from, to, one);
    }
    fprintf(stderr, "n1 lines|socket|file|http|shm [one], or n1 terminal COMMAND...\n");
    return 2;
}
