/* A client of the remote protocol: fills snapshots at the proxy and checks them at the cache, through pipes, with many images on
 * each connection.
 *
 *   cc -O2 -Wall -Wextra -Werror -pthread -o client client.c
 *   client fill  PROXY_SOCKET LIST IMAGES CONNECTIONS SNAPSHOT...
 *   client check CACHE_SOCKET LIST IMAGES CONNECTIONS SNAPSHOT...
 *
 * Linux, C11, libc only. Nothing waits for a daemon longer than TIMEOUT seconds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef TIMEOUT
#define TIMEOUT 60
#endif

enum { MODE_READ = 0, MODE_WRITE = 1, MODE_APPEND = 02000 };
enum { REMOTE_ENOENT = 2 };
enum { MAX_HEADER = 16384, MAX_REPLY = 65536, MAX_IMAGE = 300000 };
static const char LIST_NAME[] = "parent";

/* Any error ends the process, all threads with it. */
__attribute__((format(printf, 1, 2))) static _Noreturn void die(const char *format, ...)
{
	char text[1024];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof text, format, args);
	va_end(args);
	fprintf(stderr, "client: %s\n", text);
	_exit(1);
}

/* ---- protobuf ---- */

static size_t put_varint(uint8_t *at, uint64_t n)
{
	size_t len = 0;

	for (; n > 127; n >>= 7)
		at[len++] = (uint8_t)(n | 128);
	at[len++] = (uint8_t)n;
	return len;
}

static size_t put_number(uint8_t *at, unsigned field, uint64_t n)
{
	size_t len = put_varint(at, (uint64_t)field << 3);

	return len + put_varint(at + len, n);
}

static size_t put_string(uint8_t *at, unsigned field, const char *text)
{
	size_t size = strlen(text), len = put_varint(at, (uint64_t)field << 3 | 2);

	len += put_varint(at + len, size);
	memcpy(at + len, text, size);
	return len + size;
}

static void put_u32(uint8_t *at, uint32_t n)
{
	for (int i = 0; i < 4; i++)
		at[i] = (uint8_t)(n >> 8 * i);
}

static uint32_t get_u32(const uint8_t *at)
{
	return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static bool get_varint(const uint8_t **at, const uint8_t *end, uint64_t *n)
{
	*n = 0;
	for (int shift = 0; *at < end && shift < 64; shift += 7) {
		uint8_t byte = *(*at)++;

		*n |= (uint64_t)(byte & 127) << shift;
		if (byte < 128)
			return true;
	}
	return false;
}

/* The next field: a number in *n, or a string of *n bytes at *text (NULL otherwise). The protocol has no other types. */
static bool get_field(const uint8_t **at, const uint8_t *end, unsigned *field, uint64_t *n, const uint8_t **text)
{
	uint64_t key;

	if (!get_varint(at, end, &key) || (key & 7 & ~2u) || !get_varint(at, end, n))
		return false;
	*field = (unsigned)(key >> 3);
	*text = key & 7 ? *at : NULL;
	if (*text && *n > (uint64_t)(end - *at))
		return false;
	*at += *text ? *n : 0;
	return true;
}

/* ---- a connection ---- */

static int dial(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct timeval limit = { .tv_sec = TIMEOUT };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (strlen(path) >= sizeof address.sun_path)
		die("%s: the path is too long", path);
	strcpy(address.sun_path, path);
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit))
		die("socket: %s", strerror(errno));
	while (connect(fd, (struct sockaddr *)&address, sizeof address))
		if (errno != EINTR)
			die("%s: %s", path, errno == EAGAIN ? "timed out" : strerror(errno));
	return fd;
}

/* False if the daemon has closed. */
static bool receive(int fd, uint8_t *data, size_t size)
{
	while (size) {
		ssize_t n = recv(fd, data, size, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n == 0 || (n < 0 && errno == ECONNRESET))
			return false;
		if (n < 0)
			die("waiting for the daemon: %s", errno == EAGAIN ? "timed out" : strerror(errno));
		data += n;
		size -= (size_t)n;
	}
	return true;
}

/* Waits for a reply. True if it is error 0; false if it is ENOENT and the caller asked for the size (of a read). */
static bool receive_reply(int fd, uint64_t *size, const char *what)
{
	uint8_t data[MAX_REPLY];
	const uint8_t *at = data, *text, *reason = data;
	uint64_t n, error = UINT64_MAX, reason_size = 0;
	uint32_t length;
	unsigned field;
	bool has_size = false;

	if (!receive(fd, data, 4) || (length = get_u32(data)) > sizeof data || !receive(fd, data, length))
		die("%s: the daemon has closed the connection (perhaps it refused the one before)", what);
	while (at < data + length) {
		if (!get_field(&at, data + length, &field, &n, &text))
			die("%s: a reply that is none", what);
		if (field == 1 && !text) {
			error = n;
		} else if (field == 16 && text) {
			reason = text;
			reason_size = n;
		} else if (field == 17 && !text && size) {
			*size = n;
			has_size = true;
		}
	}
	if (error == REMOTE_ENOENT && size)
		return false;
	if (error)
		die("%s: error %lld: %s (%.*s)", what, (long long)error, strerror((int)error), (int)reason_size, (const char *)reason);
	if (size && !has_size)
		die("%s: a reply without the size", what);
	return true;
}

/* The daemon has closed while something was sent: it may have said why in one of the replies that are still to come. */
static _Noreturn void refused(int fd, int replies, const char *what)
{
	while (replies--)
		receive_reply(fd, NULL, what);
	die("%s: refused: the daemon has closed", what);
}

/* One message, with a descriptor if pass is not -1. */
static void send_all(int fd, const void *data, size_t size, int pass, int replies, const char *what)
{
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = { (void *)(uintptr_t)data, size };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

	if (pass >= 0) {
		memset(&control, 0, sizeof control);
		message.msg_control = control.space;
		message.msg_controllen = sizeof control.space;
		struct cmsghdr *head = CMSG_FIRSTHDR(&message);
		head->cmsg_level = SOL_SOCKET;
		head->cmsg_type = SCM_RIGHTS;
		head->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(head), &pass, sizeof pass);
	}
	while (part.iov_len) {
		ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EPIPE || errno == ECONNRESET))
			refused(fd, replies, what);
		if (n < 0)
			die("%s: %s", what, errno == EAGAIN ? "timed out" : strerror(errno));
		part.iov_base = (char *)part.iov_base + n;
		part.iov_len -= (size_t)n;
		message.msg_control = NULL;
		message.msg_controllen = 0;
	}
}

struct header {
	const char *snapshot, *name;
	uint32_t mode;
	bool finish, pipe, acknowledge;
	int64_t images; /* -1: not told */
};

static void send_header(int fd, const struct header *h, int replies, const char *what)
{
	uint8_t data[4 + MAX_HEADER];
	size_t len = 4;

	if (strlen(h->snapshot) > 4096 || strlen(h->name) > 4096)
		die("%s: the name or the id is too long", what);
	len += put_string(data + len, 1, h->name);
	len += put_string(data + len, 2, h->snapshot);
	len += put_number(data + len, 3, h->mode);
	if (h->finish)
		len += put_number(data + len, 16, 1);
	if (h->mode == MODE_READ && !h->finish)
		len += put_number(data + len, 17, h->pipe);
	if (h->acknowledge)
		len += put_number(data + len, 18, 1);
	if (h->images >= 0)
		len += put_number(data + len, 19, (uint64_t)h->images);
	put_u32(data, (uint32_t)(len - 4));
	send_all(fd, data, len, -1, replies, what);
}

static void wait_for(int fd, short events, const char *what)
{
	struct pollfd p = { .fd = fd, .events = events };
	int n;

	do
		n = poll(&p, 1, TIMEOUT * 1000);
	while (n < 0 && errno == EINTR);
	if (n <= 0)
		die("%s: pipe: %s", what, n ? strerror(errno) : "timed out");
}

/* Writes or appends to an image through a pipe. In a hurry the bytes are sent before the first reply has come. */
static void put(int fd, const char *snapshot, const char *name, bool append, bool acknowledge, bool hurry, const uint8_t *data,
		size_t size)
{
	struct header h = { snapshot, name, append ? MODE_APPEND : MODE_WRITE, .acknowledge = acknowledge, .images = -1 };
	int ends[2], replies = acknowledge ? 2 : 0;
	char what[128];

	snprintf(what, sizeof what, "%s of %.40s %.40s", append ? "append" : "write", snapshot, name);
	send_header(fd, &h, replies, what);
	if (replies && !hurry) {
		receive_reply(fd, NULL, what);
		replies--;
	}
	if (pipe2(ends, O_CLOEXEC) || fcntl(ends[1], F_SETFL, O_WRONLY | O_NONBLOCK))
		die("pipe: %s", strerror(errno));
	send_all(fd, "", 1, ends[0], replies, what);
	close(ends[0]);
	while (size) {
		ssize_t n = write(ends[1], data, size);

		if (n < 0 && errno == EPIPE)
			refused(fd, replies, what);
		if (n < 0 && errno == EAGAIN) {
			wait_for(ends[1], POLLOUT, what);
			continue;
		}
		if (n < 0 && errno != EINTR)
			die("%s: pipe: %s", what, strerror(errno));
		if (n > 0) {
			data += n;
			size -= (size_t)n;
		}
	}
	close(ends[1]);
	if (acknowledge) {
		if (hurry) {
			receive_reply(fd, NULL, what);
			replies--;
		}
		send_all(fd, "", 1, -1, replies, what);
		receive_reply(fd, NULL, what);
	}
}

/* Reads an image through a pipe into data: its size, or -1 if there is no such image. The connection can be used again. */
static ssize_t get(int fd, const char *snapshot, const char *name, uint8_t *data, size_t space)
{
	struct header h = { snapshot, name, MODE_READ, .pipe = true, .images = -1 };
	uint64_t told;
	size_t got = 0;
	uint8_t beyond;
	int ends[2];
	char what[128];

	snprintf(what, sizeof what, "read of %.40s %.40s", snapshot, name);
	send_header(fd, &h, 1, what);
	if (!receive_reply(fd, &told, what))
		return -1;
	if (told > space)
		die("%s: a size of %llu", what, (unsigned long long)told);
	if (pipe2(ends, O_CLOEXEC))
		die("pipe: %s", strerror(errno));
	send_all(fd, "", 1, ends[1], 0, what);
	close(ends[1]);
	for (ssize_t n = 1; n;) {
		bool full = got == told;

		wait_for(ends[0], POLLIN, what);
		n = read(ends[0], full ? &beyond : data + got, full ? 1 : told - got);
		if (n < 0 && errno != EINTR)
			die("%s: pipe: %s", what, strerror(errno));
		got += n > 0 ? (size_t)n : 0;
		if (got > told)
			die("%s: more bytes came than were told", what);
	}
	close(ends[0]);
	if (got != told)
		die("%s: %llu bytes were told, %zu came", what, (unsigned long long)told, got);
	return (ssize_t)got;
}

/* Appends an id to a list: the entry goes on the socket. */
static void append_id(const char *path, const char *list, const char *snapshot)
{
	struct header h = { list, LIST_NAME, MODE_APPEND, .acknowledge = true, .images = -1 };
	uint8_t entry[MAX_HEADER];
	const char *what = "append of an id";
	int fd = dial(path);

	if (strlen(snapshot) > 4096)
		die("%s: it is too long", what);
	send_header(fd, &h, 2, what);
	receive_reply(fd, NULL, what);
	size_t len = put_string(entry + 4, 1, snapshot);
	put_u32(entry, (uint32_t)len);
	send_all(fd, entry, 4 + len, -1, 1, what);
	shutdown(fd, SHUT_WR);
	receive_reply(fd, NULL, what);
	close(fd);
}

/* The list has to be these ids in this order. */
static void check_list(const char *path, const char *list, char **ids, int count)
{
	static uint8_t data[1 << 20];
	int fd = dial(path), found = 0;
	ssize_t size = get(fd, list, LIST_NAME, data, sizeof data);
	const uint8_t *at = data, *end = data + (size > 0 ? size : 0), *text;
	unsigned field;
	uint64_t n;

	for (; at < end; found++) {
		size_t len = end - at < 4 ? SIZE_MAX : get_u32(at);

		if (end - at < 4 || len > (size_t)(end - at) - 4)
			die("the list ends within an id");
		const uint8_t *next = at + 4 + len;
		at += 4;
		if (!get_field(&at, next, &field, &n, &text) || field != 1 || !text || at != next)
			die("the list has an entry that is no id");
		if (found >= count || n != strlen(ids[found]) || memcmp(text, ids[found], n))
			die("the list has \"%.*s\" at %d, not \"%s\"", (int)n, (const char *)text, found,
			    found < count ? ids[found] : "");
	}
	if (found != count)
		die("the list has %d ids, not %d", found, count);
	close(fd);
}

static void finish(const char *path, const char *snapshot, uint32_t mode, int64_t images)
{
	struct header h = { snapshot, "", mode, .finish = true, .acknowledge = mode == MODE_WRITE, .images = images };
	int fd = dial(path);

	send_header(fd, &h, 1, "finish");
	receive_reply(fd, NULL, "finish");
	close(fd);
}

/* ---- fill and check ---- */

static const char *socket_path, *snapshot_id;
static int snapshot_number, connections;
static long image_count;
static bool filling;
static _Atomic unsigned long long bytes;

static size_t content(int s, long k, uint8_t *data)
{
	static const size_t sizes[] = { 0, 1, 100, 4096, 4097, 20000, 65536, 300000 };
	size_t size = sizes[k % 8];

	for (size_t i = 0; i < size; i++)
		data[i] = i < 251 ? (uint8_t)(s * 31 + k * 7 + (long)i * 13) : data[i - 251];
	return size;
}

static void image_name(char *name, size_t space, int s, long k)
{
	snprintf(name, space, "tmpfs-dev-%d-%ld.tar.gz.img", s, k);
}

static size_t check_image(int fd, const char *snapshot, int s, long k, uint8_t *want, uint8_t *got)
{
	char name[64];

	image_name(name, sizeof name, s, k);
	size_t size = content(s, k, want);
	ssize_t n = get(fd, snapshot, name, got, MAX_IMAGE);
	if (n < 0)
		die("%s %s is not there", snapshot, name);
	if ((size_t)n != size || memcmp(want, got, size))
		die("%s %s: %zd bytes instead of %zu, or other ones", snapshot, name, n, size);
	return size;
}

/* The images k, k + connections, ... of the snapshot, on one connection. */
static void *work(void *first)
{
	uint8_t *data = malloc(MAX_IMAGE), *other = malloc(MAX_IMAGE);
	int fd = dial(socket_path);
	char name[64];

	if (!data || !other)
		die("no memory");
	for (long k = (long)(intptr_t)first; k < image_count; k += connections) {
		if (!filling) {
			bytes += check_image(fd, snapshot_id, snapshot_number, k, data, other);
			continue;
		}
		bool acknowledge = (k + k / 8) % 2, hurry = k / 16 % 2;
		size_t size = content(snapshot_number, k, data), half = k % 100 == 99 ? size / 2 : 0;
		image_name(name, sizeof name, snapshot_number, k);
		if (k % 100 == 99)
			put(fd, snapshot_id, name, false, true, hurry, data, half);
		put(fd, snapshot_id, name, k % 100 == 99, acknowledge, hurry, data + half, size - half);
		bytes += size;
	}
	close(fd);
	free(data);
	free(other);
	return NULL;
}

static void work_all(void)
{
	pthread_t *threads = calloc((size_t)connections, sizeof *threads);

	for (long i = 0; i < connections; i++)
		if (!threads || pthread_create(&threads[i], NULL, work, (void *)(intptr_t)i))
			die("threads cannot be started");
	for (int i = 0; i < connections; i++)
		pthread_join(threads[i], NULL);
	free(threads);
}

/* On one connection: a name that is not there, and after it some images. */
static void check_some(const char *snapshot, int s, long count, long some)
{
	static uint8_t want[MAX_IMAGE], got[MAX_IMAGE];
	int fd = dial(socket_path);
	char name[64];

	image_name(name, sizeof name, s, 1000000000);
	if (get(fd, snapshot, name, got, sizeof got) >= 0)
		die("%s: an image that nobody wrote could be read", snapshot);
	for (long j = 0, last = -1; j < some && count; last = j++ * count / some)
		if (j * count / some != last)
			check_image(fd, snapshot, s, j * count / some, want, got);
	close(fd);
}

int main(int argc, char **argv)
{
	struct timespec start, end;

	signal(SIGPIPE, SIG_IGN);
	clock_gettime(CLOCK_MONOTONIC, &start);
	if (argc < 7 || (strcmp(argv[1], "fill") && strcmp(argv[1], "check")) || atol(argv[4]) < 0 || atoi(argv[5]) < 1)
		die("usage: client fill|check SOCKET LIST IMAGES CONNECTIONS SNAPSHOT...");
	filling = !strcmp(argv[1], "fill");
	socket_path = argv[2];
	connections = atoi(argv[5]);
	char **ids = argv + 6;
	int count = argc - 6;
	long images = atol(argv[4]), previous = 0;

	if (!filling)
		check_list(socket_path, argv[3], ids, count);
	for (int s = 0; s < count; s++) {
		snapshot_number = s;
		snapshot_id = ids[s];
		image_count = images / count + (s < images % count);
		if (filling) {
			append_id(socket_path, argv[3], ids[s]);
			check_list(socket_path, argv[3], ids, s + 1);
		}
		work_all();
		if (!filling)
			check_some(ids[s], s, image_count, 1);
		else if (s)
			check_some(ids[s - 1], s - 1, previous, 20);
		if (filling)
			finish(socket_path, ids[s], MODE_WRITE, image_count + image_count / 100);
		previous = image_count;
	}
	if (!filling)
		finish(socket_path, ids[count - 1], MODE_READ, -1);
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%ld images, %llu bytes, %.1f s\n", images, (unsigned long long)bytes,
	       (double)(end.tv_sec - start.tv_sec) + (double)(end.tv_nsec - start.tv_nsec) / 1e9);
	return 0;
}
