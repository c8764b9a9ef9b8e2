/* The hot loop of `benchmarks.relay`: sends prepared messages, counts what comes back.
 *
 * Sockets are made, bound and connected by the caller and inherited; messages come by standard
 * input, each as its length (u32, host order) and its bytes; the figures leave by standard output
 * as one JSON object. One thread, which the caller pins to a core.
 *
 *   relay_generator load send=FD receive=FD[,FD...] bytes=N [packets=N] [rate=N] [window=N]
 *                        [batch=N] [warm_ms=N] [measure_ms=N] [cpu=FILE[,FILE...]]
 *                        [kernel=FILE[,FILE...]]
 *   relay_generator ping client=FD peer=FD count=N [pause_us=N]
 *
 * load: a message is `packets` packets of which each arrives as `bytes` bytes (UDP_GRO trains are
 * counted by their segments). `window`: never more packets under way than that; those that are
 * lost stay counted as under way until nothing has come for 20 ms. So a relay is kept busy and not
 * flooded. `rate`: packets a second at most, and the loop sleeps between batches. Counted is what
 * happens in `measure_ms` after `warm_ms`, but loss is that of the whole run. `cpu` and `kernel` name
 * schedstat files of threads (nanoseconds on a core), summed up apart; idle and softirq time of the
 * machine are always told.
 *
 * ping: the first message goes from the client, whatever comes is answered by the peer with the
 * second one; round trips in nanoseconds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum {
	MAX_MESSAGES = 1024,
	MAX_MESSAGE_BYTES = 65536,
	MAX_SOCKETS = 256,
	MAX_FILES = 256,
	MAX_BATCH = 256,
	RECEIVE_BATCH = 64,
	PEEK_BYTES = 16, /* the rest of a datagram is not copied */
	MAX_PINGS = 1 << 20,
};
#define MS 1000000ull
#define STALLED_NS (20 * MS)
#define STRAGGLER_NS (200 * MS)

static struct mmsghdr outgoing[MAX_MESSAGES + MAX_BATCH];
static struct iovec outgoing_iov[MAX_MESSAGES + MAX_BATCH];
static struct mmsghdr incoming[RECEIVE_BATCH];
static struct iovec incoming_iov[RECEIVE_BATCH];
static char incoming_data[RECEIVE_BATCH][PEEK_BYTES];
static char incoming_control[RECEIVE_BATCH][CMSG_SPACE(sizeof(int))];
static unsigned messages;
static int receivers[MAX_SOCKETS];
static unsigned receiver_count;
static int epoll_fd = -1;
struct files {
	const char *paths[MAX_FILES];
	unsigned count;
};
static struct files cpu_files, kernel_files;
static uint64_t bytes_expected, wrong_size;

static void fail(const char *what)
{
	fprintf(stderr, "relay_generator: %s: %s\n", what, errno ? strerror(errno) : "wrong");
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void sleep_until(uint64_t at_ns)
{
	struct timespec t = {.tv_sec = (time_t)(at_ns / 1000000000ull),
			     .tv_nsec = (long)(at_ns % 1000000000ull)};
	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

/* --- arguments ------------------------------------------------------------------------------- */

static const char *argument(int argc, char **argv, const char *name)
{
	size_t length = strlen(name);
	for (int i = 2; i < argc; i++)
		if (!strncmp(argv[i], name, length) && argv[i][length] == '=')
			return argv[i] + length + 1;
	return NULL;
}

static uint64_t number(int argc, char **argv, const char *name, long long otherwise)
{
	const char *text = argument(argc, argv, name);
	if (!text && otherwise < 0)
		fail(name);
	return text ? strtoull(text, NULL, 10) : (uint64_t)otherwise;
}

static unsigned split(const char *text, const char **parts, unsigned most)
{
	unsigned count = 0;
	char *copy = strdup(text ? text : "");
	for (char *part = strtok(copy, ","); part; part = strtok(NULL, ",")) {
		if (count == most)
			fail("too long a list");
		parts[count++] = part;
	}
	return count;
}

static void read_fully(void *into, size_t size)
{
	if (fread(into, 1, size, stdin) != size)
		fail("standard input ended early");
}

static void read_messages(void)
{
	uint32_t size;
	while (fread(&size, sizeof size, 1, stdin) == 1) {
		if (messages == MAX_MESSAGES || size > MAX_MESSAGE_BYTES)
			fail("too many or too large messages");
		void *data = malloc(size ? size : 1);
		read_fully(data, size);
		outgoing_iov[messages] = (struct iovec){data, size};
		messages++;
	}
	if (!messages)
		fail("no message");
	/* Some of them once more behind the end: a batch never wraps around. */
	for (unsigned i = 0; i < messages + MAX_BATCH; i++) {
		outgoing_iov[i] = outgoing_iov[i % messages];
		outgoing[i].msg_hdr.msg_iov = &outgoing_iov[i];
		outgoing[i].msg_hdr.msg_iovlen = 1;
	}
}

/* --- processor time -------------------------------------------------------------------------- */

struct snapshot {
	uint64_t at_ns, threads_ns, kernel_ns, own_ns;
	unsigned long long idle_ticks, softirq_ticks, steal_ticks;
};

static size_t read_file(const char *path, char *into, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0; /* a thread that has ended */
	ssize_t got = read(fd, into, size - 1);
	close(fd);
	into[got > 0 ? got : 0] = 0;
	return got > 0 ? (size_t)got : 0;
}

static uint64_t run_ns(const struct files *files)
{
	char text[128];
	uint64_t sum = 0;
	for (unsigned i = 0; i < files->count; i++)
		if (read_file(files->paths[i], text, sizeof text))
			sum += strtoull(text, NULL, 10);
	return sum;
}

static struct snapshot snapshot(void)
{
	struct snapshot s = {.at_ns = now_ns(),
			     .threads_ns = run_ns(&cpu_files),
			     .kernel_ns = run_ns(&kernel_files)};
	char text[512];
	unsigned long long user, nice, system, iowait, irq;
	if (!read_file("/proc/stat", text, sizeof text) ||
	    sscanf(text, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &system,
		   &s.idle_ticks, &iowait, &irq, &s.softirq_ticks, &s.steal_ticks) != 8)
		fail("/proc/stat");
	s.idle_ticks += iowait;
	struct rusage usage;
	getrusage(RUSAGE_SELF, &usage);
	s.own_ns = (uint64_t)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000000ull +
		   (uint64_t)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000ull;
	return s;
}

/* --- receiving ------------------------------------------------------------------------------- */

static uint64_t segments_of(struct mmsghdr *message)
{
	uint64_t length = message->msg_len, segment = length;
	struct msghdr *header = &message->msg_hdr;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c; c = CMSG_NXTHDR(header, c))
		if (c->cmsg_level == IPPROTO_UDP && c->cmsg_type == UDP_GRO) {
			int size;
			memcpy(&size, CMSG_DATA(c), sizeof size);
			segment = (uint64_t)size;
		}
	if (segment != bytes_expected || length % segment) {
		wrong_size++;
		return 0;
	}
	return length / segment;
}

static uint64_t receive_from(int fd)
{
	uint64_t received = 0;
	for (;;) {
		for (unsigned i = 0; i < RECEIVE_BATCH; i++)
			incoming[i].msg_hdr.msg_controllen = sizeof incoming_control[i];
		int got = recvmmsg(fd, incoming, RECEIVE_BATCH, MSG_DONTWAIT | MSG_TRUNC, NULL);
		if (got < 0 && errno != EAGAIN && errno != ECONNREFUSED && errno != EINTR)
			fail("recvmmsg");
		for (int i = 0; i < got; i++)
			received += segments_of(&incoming[i]);
		if (got < RECEIVE_BATCH)
			return received;
	}
}

static uint64_t receive_all(void)
{
	if (receiver_count == 1)
		return receive_from(receivers[0]);
	struct epoll_event events[MAX_SOCKETS];
	int ready = epoll_wait(epoll_fd, events, MAX_SOCKETS, 0);
	uint64_t received = 0;
	for (int i = 0; i < ready; i++)
		received += receive_from(events[i].data.fd);
	return received;
}

static void prepare_receivers(const char *list)
{
	const char *parts[MAX_SOCKETS];
	receiver_count = split(list, parts, MAX_SOCKETS);
	if (!receiver_count)
		fail("receive");
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	for (unsigned i = 0; i < receiver_count; i++) {
		receivers[i] = atoi(parts[i]);
		struct epoll_event event = {.events = EPOLLIN, .data.fd = receivers[i]};
		if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, receivers[i], &event))
			fail("epoll_ctl");
	}
	for (unsigned i = 0; i < RECEIVE_BATCH; i++) {
		incoming_iov[i] = (struct iovec){incoming_data[i], PEEK_BYTES};
		incoming[i].msg_hdr.msg_iov = &incoming_iov[i];
		incoming[i].msg_hdr.msg_iovlen = 1;
		incoming[i].msg_hdr.msg_control = incoming_control[i];
	}
	receive_all(); /* what earlier runs left behind */
	wrong_size = 0;
}

/* --- load ------------------------------------------------------------------------------------ */

static unsigned send_some(int fd, unsigned cursor, unsigned count)
{
	int done = sendmmsg(fd, outgoing + cursor, count, MSG_DONTWAIT);
	if (done < 0 && errno != EAGAIN && errno != ENOBUFS && errno != ECONNREFUSED)
		fail("sendmmsg");
	return done > 0 ? (unsigned)done : 0;
}

static int load(int argc, char **argv)
{
	int fd = (int)number(argc, argv, "send", -1);
	uint64_t packets = number(argc, argv, "packets", 1);
	uint64_t rate = number(argc, argv, "rate", 0);
	uint64_t window = number(argc, argv, "window", 0);
	uint64_t batch = number(argc, argv, "batch", 32);
	uint64_t warm_ns = number(argc, argv, "warm_ms", 100) * MS;
	uint64_t measure_ns = number(argc, argv, "measure_ms", 500) * MS;
	bytes_expected = number(argc, argv, "bytes", -1);
	if (!bytes_expected || !packets || !batch || batch > MAX_BATCH)
		fail("bytes, packets or batch");
	cpu_files.count = split(argument(argc, argv, "cpu"), cpu_files.paths, MAX_FILES);
	kernel_files.count = split(argument(argc, argv, "kernel"), kernel_files.paths, MAX_FILES);
	prepare_receivers(argument(argc, argv, "receive"));
	read_messages();

	uint64_t sent = 0, received = 0, written_off = 0, sent_at_begin = 0, received_at_begin = 0;
	uint64_t rounds = 0, full_rounds = 0, began = now_ns(), last_receipt = began;
	unsigned cursor = 0;
	bool measuring = false;
	struct snapshot first, last;
	for (;;) {
		uint64_t got = receive_all(), now = now_ns();
		received += got;
		if (got)
			last_receipt = now;
		if (!measuring && now >= began + warm_ns) {
			measuring = true;
			first = snapshot();
			sent_at_begin = sent;
			received_at_begin = received;
		}
		if (measuring && now >= first.at_ns + measure_ns) {
			last = snapshot();
			break;
		}
		uint64_t allowed = batch;
		if (rate) {
			uint64_t due = (now - began) * rate / 1000000000ull;
			uint64_t ahead = due > sent ? (due - sent) / packets : 0;
			allowed = ahead < allowed ? ahead : allowed;
		}
		if (window) {
			uint64_t gone = received + written_off;
			uint64_t under_way = sent > gone ? sent - gone : 0;
			uint64_t room = window > under_way ? (window - under_way) / packets : 0;
			if (!room && now > last_receipt + STALLED_NS) {
				written_off += under_way;
				last_receipt = now;
			}
			rounds++;
			full_rounds += !room;
			allowed = room < allowed ? room : allowed;
		}
		if (allowed) {
			sent += packets * send_some(fd, cursor, (unsigned)allowed);
			cursor = (cursor + (unsigned)allowed) % messages;
		}
		if (rate && allowed < batch)
			sleep_until(now + batch * packets * 1000000000ull / rate);
	}
	uint64_t sent_measured = sent - sent_at_begin, received_measured = received - received_at_begin;
	for (last_receipt = now_ns(); received < sent && now_ns() < last_receipt + STRAGGLER_NS;) {
		uint64_t got = receive_all();
		received += got;
		if (got)
			last_receipt = now_ns();
	}
	uint64_t lost = sent > received ? sent - received : 0;
	printf("{\"elapsed_ns\": %llu, \"sent\": %llu, \"received\": %llu, \"loss\": %.6f, "
	       "\"wrong_size\": %llu, \"window_full\": %.4f, \"cpu_ns\": %llu, "
	       "\"kernel_cpu_ns\": %llu, \"own_cpu_ns\": %llu, \"idle_ticks\": %llu, "
	       "\"softirq_ticks\": %llu, \"steal_ticks\": %llu}\n",
	       (unsigned long long)(last.at_ns - first.at_ns), (unsigned long long)sent_measured,
	       (unsigned long long)received_measured, sent ? (double)lost / (double)sent : 0.0,
	       (unsigned long long)wrong_size,
	       rounds ? (double)full_rounds / (double)rounds : 0.0,
	       (unsigned long long)(last.threads_ns - first.threads_ns),
	       (unsigned long long)(last.kernel_ns - first.kernel_ns),
	       (unsigned long long)(last.own_ns - first.own_ns), last.idle_ticks - first.idle_ticks,
	       last.softirq_ticks - first.softirq_ticks, last.steal_ticks - first.steal_ticks);
	return 0;
}

/* --- round trips ----------------------------------------------------------------------------- */

static bool arrives(int fd, uint64_t deadline_ns)
{
	char data[2048];
	for (;;) {
		if (recv(fd, data, sizeof data, MSG_DONTWAIT) > 0)
			return true;
		if (now_ns() > deadline_ns)
			return false;
	}
}

static int ascending(const void *a, const void *b)
{
	uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
	return left < right ? -1 : left > right;
}

static int ping(int argc, char **argv)
{
	static uint64_t trips[MAX_PINGS];
	int client = (int)number(argc, argv, "client", -1), peer = (int)number(argc, argv, "peer", -1);
	uint64_t count = number(argc, argv, "count", -1);
	uint64_t pause_ns = number(argc, argv, "pause_us", 200) * 1000;
	read_messages();
	if (messages != 2 || !count || count > MAX_PINGS)
		fail("two messages, and a count");
	unsigned done = 0, lost = 0;
	for (uint64_t i = 0; i < count; i++) {
		char data[2048];
		while (recv(client, data, sizeof data, MSG_DONTWAIT) > 0 ||
		       recv(peer, data, sizeof data, MSG_DONTWAIT) > 0)
			; /* what came too late */
		uint64_t began = now_ns();
		bool whole = send(client, outgoing_iov[0].iov_base, outgoing_iov[0].iov_len, 0) > 0 &&
			     arrives(peer, began + 100 * MS) &&
			     send(peer, outgoing_iov[1].iov_base, outgoing_iov[1].iov_len, 0) > 0 &&
			     arrives(client, began + 100 * MS);
		uint64_t now = now_ns();
		if (whole)
			trips[done++] = now - began;
		else
			lost++;
		while (now_ns() < now + pause_ns)
			;
	}
	if (!done)
		fail("no round trip");
	qsort(trips, done, sizeof trips[0], ascending);
	printf("{\"p50_ns\": %llu, \"p95_ns\": %llu, \"round_trips\": %u, \"lost\": %u}\n",
	       (unsigned long long)trips[done / 2], (unsigned long long)trips[done * 95ull / 100],
	       done, lost);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], "load"))
		return load(argc, argv);
	if (argc > 1 && !strcmp(argv[1], "ping"))
		return ping(argc, argv);
	errno = EINVAL;
	fail("load or ping");
	return 2;
}
