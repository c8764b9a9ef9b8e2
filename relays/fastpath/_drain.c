/* One turn of a relay's UDP sockets without Python: what the core has allowed (a bound channel whose
 * peer has answered) goes from socket to socket, everything else is handed back to the core.
 *
 * A `Drain` knows sockets (`watch`) and routes (`put`). A route is found by socket number, source
 * address and, from clients, channel number; it says whither data goes and until when. `turn` asks
 * epoll what is readable, reads it by recvmmsg into slots, and notes for each datagram where in its
 * slot the data lies. Nothing is copied: what leaves is gathered from the slots by sendmmsg. Data of
 * one route and one size that came in one turn leaves as one train (UDP_SEGMENT), also where it came
 * datagram by datagram. The order within a route is kept, the order between routes is not.
 *
 * Bounds: every index is checked against the constants below before it is used; lengths are those
 * that the kernel returned, and lengths in headers are compared with them. The Python object is used
 * by one thread, with the GIL held; a turn never waits. Linux only.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>

/* Under AddressSanitizer what follows a datagram in its slot may not be read. */
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define CLOSE(start, size) ASAN_POISON_MEMORY_REGION(start, size)
#define OPEN(start, size) ASAN_UNPOISON_MEMORY_REGION(start, size)
#else
#define CLOSE(start, size) ((void)(start), (void)(size))
#define OPEN(start, size) ((void)(start), (void)(size))
#endif

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

#define VERSION 1 /* raised with each change of what it does; see drain.py */
#define EVENTS 256            /* sockets read in one turn */
#define SLOTS 128             /* messages held before what they hold is sent */
#define DATAGRAM_BYTES 65535
#define SLOT_BYTES (DATAGRAM_BYTES + 1 + 4096)
#define LISTENER_MESSAGES 128 /* read from a listener in one turn */
#define SOCKET_MESSAGES 32    /* and from the socket of an allocation */
#define MAX_SEGMENTS 64       /* UDP_MAX_SEGMENTS of any kernel that has it */
#define MAX_PIECES (SLOTS * MAX_SEGMENTS)
#define MAX_TRAIN_BYTES 65507
#define MAX_DATA_BYTES 65000 /* relays.turn.MAX_DATA_BYTES */
#define HEADER_BYTES 4
#define SEND_BATCH 128
#define FIRST_ROUTES 256
#define MAX_ROUTES (1 << 19)
#define TRAINS_AFTER_REFUSAL 1000 /* datagrams that go alone before another train is tried */
#define MAX_DESCRIPTOR (1 << 21)

typedef union {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
} Name;

typedef struct {
    uint32_t number; /* of the socket on which data comes */
    uint16_t channel; /* 0: from a peer */
    uint16_t port;    /* network order */
    uint8_t address[16];
    uint64_t family;
} Key;
_Static_assert(sizeof(Key) == 32, "without holes, since it is compared and hashed as bytes");

typedef struct {
    Key key;
    int64_t expires_ns;
    Name to;
    uint32_t to_number;
    int to_descriptor;
    uint16_t header_channel; /* 0: the header is taken off */
    uint16_t plain;          /* datagrams that go alone, since a train was refused */
    uint32_t group;          /* the latest of its groups, if that is its own */
    uint8_t used;
} Route;

typedef struct {
    const uint8_t *data;
    uint32_t size;
    int32_t next;
} Piece;

typedef struct { /* one datagram or train to send */
    Route *route;
    int32_t first, last;
    uint32_t count, each, total;
    uint8_t header[HEADER_BYTES], last_header[HEADER_BYTES];
    uint8_t closed;
} Group;

typedef struct {
    uint32_t number; /* 0: not watched */
    uint8_t is_listener;
} Watched;

typedef struct {
    PyObject_HEAD
    uint64_t seed;
    int64_t now;
    uint8_t *slots;
    Watched *watched;
    uint32_t watched_size;
    Route *routes;
    uint32_t routes_size, routes_used;
    uint32_t slots_used, pieces_used, groups_used;
    Piece pieces[MAX_PIECES];
    Group groups[MAX_PIECES];
    struct mmsghdr in[SLOTS];
    struct iovec in_vector[SLOTS];
    Name in_name[SLOTS];
    struct mmsghdr out[SEND_BATCH];
    struct iovec out_vector[2 * MAX_PIECES];
    _Alignas(struct cmsghdr) uint8_t in_note[SLOTS][CMSG_SPACE(sizeof(int)) + 64];
    _Alignas(struct cmsghdr) uint8_t out_note[SEND_BATCH][CMSG_SPACE(sizeof(uint16_t))];
    struct epoll_event events[EVENTS];
    uint64_t received, receive_errors, sent, dropped_full, dropped_refused;
    uint64_t relayed, relayed_bytes, trains;
} Drain;

/* --- routes ------------------------------------------------------------------------------------ */

static uint64_t mix(uint64_t a, uint64_t b) {
    __uint128_t product = (__uint128_t)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint32_t hash_of(const Drain *self, const Key *key) {
    uint64_t words[4];
    memcpy(words, key, sizeof words);
    uint64_t hash = self->seed;
    for (int i = 0; i < 4; i++)
        hash = mix(hash ^ words[i] ^ 0x9e3779b97f4a7c15u, 0xd6e8feb86659fd93u ^ self->seed);
    return (uint32_t)(hash ^ (hash >> 32));
}

/* The place of the key, or the free one where it belongs: there always is a free one. */
static uint32_t place_of(const Drain *self, const Route *routes, uint32_t size, const Key *key) {
    uint32_t at = hash_of(self, key) & (size - 1);
    while (routes[at].used && memcmp(&routes[at].key, key, sizeof *key) != 0)
        at = (at + 1) & (size - 1);
    return at;
}

static Route *find(Drain *self, const Key *key) {
    Route *route = &self->routes[place_of(self, self->routes, self->routes_size, key)];
    return route->used && route->expires_ns > self->now ? route : NULL;
}

/* Make room for two more, dropping what has ended. 0: there is none. */
static int make_room(Drain *self) {
    if (2 * (self->routes_used + 2) <= self->routes_size)
        return 1;
    uint32_t living = 0;
    for (uint32_t i = 0; i < self->routes_size; i++)
        living += self->routes[i].used && self->routes[i].expires_ns > self->now;
    uint32_t size = self->routes_size;
    if (4 * (living + 2) > size)
        size *= 2;
    if (size > 2 * MAX_ROUTES)
        return 0;
    Route *routes = calloc(size, sizeof *routes);
    if (routes == NULL)
        return 0;
    for (uint32_t i = 0; i < self->routes_size; i++) {
        const Route *old = &self->routes[i];
        if (old->used && old->expires_ns > self->now)
            routes[place_of(self, routes, size, &old->key)] = *old;
    }
    free(self->routes);
    self->routes = routes;
    self->routes_size = size;
    self->routes_used = living;
    return 1;
}

static void remove_key(Drain *self, const Key *key) {
    uint32_t mask = self->routes_size - 1;
    uint32_t hole = place_of(self, self->routes, self->routes_size, key);
    if (!self->routes[hole].used)
        return;
    self->routes[hole].used = 0;
    self->routes_used--;
    /* Move what would no longer be found over the hole. */
    for (uint32_t at = (hole + 1) & mask; self->routes[at].used; at = (at + 1) & mask) {
        uint32_t home = hash_of(self, &self->routes[at].key) & mask;
        if (((at - home) & mask) >= ((at - hole) & mask)) {
            self->routes[hole] = self->routes[at];
            self->routes[at].used = 0;
            hole = at;
        }
    }
}

static void put_route(Drain *self, const Route *made) {
    Route *route = &self->routes[place_of(self, self->routes, self->routes_size, &made->key)];
    self->routes_used += !route->used;
    *route = *made;
}

/* 0: an address that routes are not made for. */
static int make_key(Key *key, uint32_t number, uint16_t channel, const Name *name) {
    memset(key, 0, sizeof *key);
    key->number = number;
    key->channel = channel;
    key->family = name->any.sa_family;
    if (name->any.sa_family == AF_INET) {
        key->port = name->v4.sin_port;
        memcpy(key->address, &name->v4.sin_addr, 4);
        return 1;
    }
    if (name->any.sa_family != AF_INET6 || IN6_IS_ADDR_LINKLOCAL(&name->v6.sin6_addr))
        return 0;
    key->port = name->v6.sin6_port;
    memcpy(key->address, &name->v6.sin6_addr, 16);
    return 1;
}

static const Watched *watched_of(const Drain *self, int descriptor) {
    if (descriptor < 0 || (uint32_t)descriptor >= self->watched_size)
        return NULL;
    const Watched *watched = &self->watched[descriptor];
    return watched->number ? watched : NULL;
}

/* --- sending ------------------------------------------------------------------------------------ */

static uint32_t header_bytes(const Route *route) { return route->header_channel ? HEADER_BYTES : 0; }

static void write_header(uint8_t *header, uint16_t channel, uint32_t size) {
    header[0] = channel >> 8, header[1] = channel & 255;
    header[2] = size >> 8, header[3] = size & 255;
}

/* Gather datagrams of a group from its `first` piece on into `vector`; how many entries. */
static size_t gather(Drain *self, Group *group, int32_t first, uint32_t count, struct iovec *vector) {
    size_t used = 0;
    int32_t at = first;
    for (uint32_t i = 0; i < count; i++) {
        Piece *piece = &self->pieces[at];
        if (group->route->header_channel) {
            vector[used].iov_base = at == group->last ? group->last_header : group->header;
            vector[used++].iov_len = HEADER_BYTES;
        }
        vector[used].iov_base = (void *)piece->data;
        vector[used++].iov_len = piece->size;
        at = piece->next;
    }
    return used;
}

static void fill(Drain *self, Group *group, uint32_t index, struct iovec *vector, size_t entries) {
    struct msghdr *message = &self->out[index].msg_hdr;
    memset(message, 0, sizeof *message);
    message->msg_name = &group->route->to;
    message->msg_namelen = group->route->to.any.sa_family == AF_INET ? sizeof(struct sockaddr_in)
                                                                     : sizeof(struct sockaddr_in6);
    message->msg_iov = vector;
    message->msg_iovlen = entries;
    if (group->count > 1) {
        uint16_t each = group->each;
        message->msg_control = self->out_note[index];
        message->msg_controllen = sizeof self->out_note[index];
        struct cmsghdr *note = CMSG_FIRSTHDR(message);
        note->cmsg_level = IPPROTO_UDP;
        note->cmsg_type = UDP_SEGMENT;
        note->cmsg_len = CMSG_LEN(sizeof each);
        memcpy(CMSG_DATA(note), &each, sizeof each);
    }
}

static int is_full(int error) {
    return error == EAGAIN || error == EWOULDBLOCK || error == ENOBUFS || error == ENOMEM;
}

static void count_refusal(Drain *self, int error, uint32_t datagrams) {
    if (is_full(error))
        self->dropped_full += datagrams;
    else
        self->dropped_refused += datagrams;
}

/* One datagram. The first refusal may be an ICMP error of an earlier one, which is told only once. */
static void send_alone(Drain *self, int descriptor, struct msghdr *message) {
    if (sendmsg(descriptor, message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        self->sent++;
    else if (is_full(errno))
        self->dropped_full++;
    else if (sendmsg(descriptor, message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        self->sent++;
    else
        count_refusal(self, errno, 1);
}

static void send_apart(Drain *self, int descriptor, Group *group) {
    struct iovec vector[2];
    struct msghdr message = {0};
    message.msg_name = &group->route->to;
    message.msg_namelen = group->route->to.any.sa_family == AF_INET ? sizeof(struct sockaddr_in)
                                                                    : sizeof(struct sockaddr_in6);
    message.msg_iov = vector;
    int32_t at = group->first;
    for (uint32_t i = 0; i < group->count; i++) {
        message.msg_iovlen = gather(self, group, at, 1, vector);
        send_alone(self, descriptor, &message);
        at = self->pieces[at].next;
    }
}

static void send_run(Drain *self, int descriptor, Group *groups, uint32_t count) {
    uint32_t done = 0;
    while (done < count) {
        int taken = sendmmsg(descriptor, self->out + done, count - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (taken > 0) {
            for (int i = 0; i < taken; i++) {
                self->sent += groups[done + i].count;
                self->trains += groups[done + i].count > 1;
            }
            done += taken;
            continue;
        }
        if (errno == EINTR)
            continue;
        Group *group = &groups[done];
        if (is_full(errno)) {
            self->dropped_full += group->count;
        } else if (group->count > 1) {
            group->route->plain = TRAINS_AFTER_REFUSAL;
            send_apart(self, descriptor, group);
        } else {
            send_alone(self, descriptor, &self->out[done].msg_hdr);
        }
        done++;
    }
}

/* Send all groups, those of one socket together, and make the slots free again. */
static void flush(Drain *self) {
    uint32_t at = 0;
    while (at < self->groups_used) {
        Group *groups = &self->groups[at];
        int descriptor = groups[0].route->to_descriptor;
        uint32_t count = 0;
        size_t entries = 0;
        while (at + count < self->groups_used && count < SEND_BATCH &&
               groups[count].route->to_descriptor == descriptor) {
            Group *group = &groups[count];
            struct iovec *vector = &self->out_vector[entries];
            size_t used = gather(self, group, group->first, group->count, vector);
            fill(self, group, count, vector, used);
            entries += used;
            count++;
        }
        send_run(self, descriptor, groups, count);
        at += count;
    }
    self->groups_used = self->pieces_used = self->slots_used = 0;
}

/* Note that `size` bytes at `data` go along `route`. There is room: a slot has at most MAX_SEGMENTS
 * datagrams, which the caller sees to. */
static void pass_on(Drain *self, Route *route, const uint8_t *data, uint32_t size) {
    uint32_t grown = size + header_bytes(route);
    int32_t index = (int32_t)self->pieces_used++;
    Group *group = route->group < self->groups_used ? &self->groups[route->group] : NULL;
    self->pieces[index] = (Piece){data, size, -1};
    self->relayed++;
    self->relayed_bytes += size;
    if (route->plain)
        route->plain--;
    if (group != NULL && group->route == route && !group->closed && !route->plain && grown > 0 &&
        grown <= group->each && group->count < MAX_SEGMENTS &&
        group->total + grown <= MAX_TRAIN_BYTES) {
        self->pieces[group->last].next = index;
        group->last = index;
        group->count++;
        group->total += grown;
        group->closed = grown < group->each;
    } else {
        route->group = self->groups_used++;
        group = &self->groups[route->group];
        group->route = route;
        group->first = group->last = index;
        group->count = 1;
        group->each = group->total = grown;
        group->closed = 0;
        write_header(group->header, route->header_channel, size);
    }
    write_header(group->last_header, route->header_channel, size);
}

/* --- receiving ---------------------------------------------------------------------------------- */

static Route *usable(Drain *self, const Key *key) {
    Route *route = find(self, key);
    if (route == NULL)
        return NULL;
    const Watched *to = watched_of(self, route->to_descriptor);
    return to != NULL && to->number == route->to_number ? route : NULL;
}

static PyObject *source_of(const Name *name) {
    char text[INET6_ADDRSTRLEN + IF_NAMESIZE + 16], interface[IF_NAMESIZE];
    if (name->any.sa_family == AF_INET) {
        if (inet_ntop(AF_INET, &name->v4.sin_addr, text, sizeof text) == NULL)
            return PyErr_SetFromErrno(PyExc_OSError);
        return Py_BuildValue("si", text, (int)ntohs(name->v4.sin_port));
    }
    if (inet_ntop(AF_INET6, &name->v6.sin6_addr, text, sizeof text) == NULL)
        return PyErr_SetFromErrno(PyExc_OSError);
    if (name->v6.sin6_scope_id && if_indextoname(name->v6.sin6_scope_id, interface) != NULL) {
        size_t used = strlen(text);
        snprintf(text + used, sizeof text - used, "%%%s", interface);
    }
    return Py_BuildValue("si", text, (int)ntohs(name->v6.sin6_port));
}

/* Hand datagrams of one source back: (number, data, source, bytes of each). -1: an exception. */
static int hand_back(PyObject *unknown, uint32_t number, const uint8_t *data, size_t size,
                     const Name *name, uint32_t each) {
    PyObject *source = source_of(name);
    if (source == NULL)
        return -1;
    PyObject *item = Py_BuildValue("(Iy#NI)", number, data, (Py_ssize_t)size, source, each);
    if (item == NULL)
        return -1;
    int result = PyList_Append(unknown, item);
    Py_DECREF(item);
    return result;
}

/* The size of each datagram in a message: what UDP_GRO says, or all of it. */
static uint32_t segment_bytes(struct msghdr *message, uint32_t size) {
    for (struct cmsghdr *note = CMSG_FIRSTHDR(message); note; note = CMSG_NXTHDR(message, note)) {
        int each;
        if (note->cmsg_level == IPPROTO_UDP && note->cmsg_type == UDP_GRO &&
            note->cmsg_len >= CMSG_LEN(sizeof each)) {
            memcpy(&each, CMSG_DATA(note), sizeof each);
            if (each > 0 && (uint32_t)each < size)
                return each;
        }
    }
    return size;
}

/* A client's datagrams: those that are ChannelData of a known route pass on. */
static int take_from_client(Drain *self, uint32_t number, const uint8_t *data, uint32_t size,
                            uint32_t each, const Name *name, PyObject *unknown) {
    Key key;
    Route *route = NULL;
    int is_candidate = make_key(&key, number, 0, name);
    for (uint32_t at = 0; at < size; at += each) {
        uint32_t length = size - at < each ? size - at : each;
        const uint8_t *one = data + at;
        if (is_candidate && length >= HEADER_BYTES && one[0] >= 0x40 && one[0] <= 0x7f) {
            uint16_t channel = (uint16_t)(one[0] << 8 | one[1]);
            uint32_t inner = (uint32_t)(one[2] << 8 | one[3]);
            if (channel != key.channel) {
                key.channel = channel;
                route = usable(self, &key);
            }
            if (route != NULL && inner <= length - HEADER_BYTES) {
                pass_on(self, route, one + HEADER_BYTES, inner);
                continue;
            }
        }
        if (hand_back(unknown, number, one, length, name, 0) < 0)
            return -1;
    }
    return 0;
}

static int take_from_peer(Drain *self, uint32_t number, const uint8_t *data, uint32_t size,
                          uint32_t each, const Name *name, PyObject *unknown) {
    Key key;
    Route *route = make_key(&key, number, 0, name) ? usable(self, &key) : NULL;
    if (route == NULL || each > MAX_DATA_BYTES)
        return hand_back(unknown, number, data, size, name, each);
    for (uint32_t at = 0; at < size; at += each)
        pass_on(self, route, data + at, size - at < each ? size - at : each);
    return 0;
}

static int take(Drain *self, const Watched *from, uint32_t slot, PyObject *unknown) {
    struct msghdr *message = &self->in[slot].msg_hdr;
    const uint8_t *data = self->in_vector[slot].iov_base;
    const Name *name = &self->in_name[slot];
    uint32_t size = self->in[slot].msg_len;
    uint32_t each = segment_bytes(message, size);
    uint32_t datagrams = size ? (size + each - 1) / each : 1;
    self->received += datagrams;
    if ((name->any.sa_family != AF_INET && name->any.sa_family != AF_INET6) ||
        message->msg_flags & MSG_TRUNC)
        return 0;
    if (size == 0 || datagrams > MAX_SEGMENTS)
        return hand_back(unknown, from->number, data, size, name, each);
    if (from->is_listener)
        return take_from_client(self, from->number, data, size, each, name, unknown);
    return take_from_peer(self, from->number, data, size, each, name, unknown);
}

static int read_socket(Drain *self, int descriptor, PyObject *unknown) {
    const Watched *from = watched_of(self, descriptor);
    if (from == NULL)
        return 0;
    uint32_t budget = from->is_listener ? LISTENER_MESSAGES : SOCKET_MESSAGES;
    while (budget > 0) {
        if (self->slots_used == SLOTS)
            flush(self);
        uint32_t first = self->slots_used, wanted = SLOTS - first;
        if (wanted > budget)
            wanted = budget;
        for (uint32_t i = first; i < first + wanted; i++) {
            OPEN(self->in_vector[i].iov_base, DATAGRAM_BYTES);
            self->in[i].msg_hdr.msg_namelen = sizeof(Name);
            self->in[i].msg_hdr.msg_controllen = sizeof self->in_note[i];
        }
        int got = recvmmsg(descriptor, self->in + first, wanted, MSG_DONTWAIT, NULL);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
            self->receive_errors++;
        if (got <= 0)
            return 0;
        self->slots_used += got;
        budget -= got;
        for (uint32_t i = first; i < first + (uint32_t)got; i++) {
            uint32_t size = self->in[i].msg_len;
            CLOSE((uint8_t *)self->in_vector[i].iov_base + size, DATAGRAM_BYTES - size);
            if (take(self, from, i, unknown) < 0)
                return -1;
        }
        if ((uint32_t)got < wanted)
            return 0;
    }
    return 0;
}

/* --- the Python object --------------------------------------------------------------------------- */

static PyObject *drain_turn(Drain *self, PyObject *args) {
    int epoll;
    long long now;
    if (!PyArg_ParseTuple(args, "iL", &epoll, &now))
        return NULL;
    PyObject *unknown = PyList_New(0), *failing = PyList_New(0);
    if (unknown == NULL || failing == NULL)
        goto failed;
    self->now = now;
    int ready = epoll_wait(epoll, self->events, EVENTS, 0);
    if (ready < 0 && errno != EINTR) {
        PyErr_SetFromErrno(PyExc_OSError);
        goto failed;
    }
    for (int i = 0; i < ready; i++) {
        int descriptor = self->events[i].data.fd;
        const Watched *watched = watched_of(self, descriptor);
        if (watched != NULL && self->events[i].events & EPOLLERR) {
            PyObject *number = PyLong_FromUnsignedLong(watched->number);
            int result = number == NULL ? -1 : PyList_Append(failing, number);
            Py_XDECREF(number);
            if (result < 0)
                goto failed;
        }
        if (read_socket(self, descriptor, unknown) < 0)
            goto failed;
    }
    flush(self);
    return Py_BuildValue("(iNN)", ready < 0 ? 0 : ready, unknown, failing);
failed:
    flush(self);
    Py_XDECREF(unknown);
    Py_XDECREF(failing);
    return NULL;
}

static PyObject *drain_watch(Drain *self, PyObject *args) {
    int descriptor, is_listener;
    unsigned int number;
    if (!PyArg_ParseTuple(args, "iIp", &descriptor, &number, &is_listener))
        return NULL;
    if (descriptor < 0 || descriptor >= MAX_DESCRIPTOR || number == 0) {
        PyErr_SetString(PyExc_ValueError, "a descriptor and a number above 0 are needed");
        return NULL;
    }
    if ((uint32_t)descriptor >= self->watched_size) {
        uint32_t size = self->watched_size ? self->watched_size : 64;
        while (size <= (uint32_t)descriptor)
            size *= 2;
        Watched *grown = realloc(self->watched, size * sizeof *grown);
        if (grown == NULL)
            return PyErr_NoMemory();
        memset(grown + self->watched_size, 0, (size - self->watched_size) * sizeof *grown);
        self->watched = grown;
        self->watched_size = size;
    }
    self->watched[descriptor] = (Watched){number, is_listener != 0};
    Py_RETURN_NONE;
}

static PyObject *drain_forget(Drain *self, PyObject *args) {
    int descriptor;
    if (!PyArg_ParseTuple(args, "i", &descriptor))
        return NULL;
    if (descriptor >= 0 && (uint32_t)descriptor < self->watched_size)
        self->watched[descriptor].number = 0;
    Py_RETURN_NONE;
}

static int read_name(const char *host, unsigned int port, Name *name) {
    memset(name, 0, sizeof *name);
    if (port > 65535)
        return 0;
    if (inet_pton(AF_INET, host, &name->v4.sin_addr) == 1) {
        name->v4.sin_family = AF_INET;
        name->v4.sin_port = htons((uint16_t)port);
        return 1;
    }
    if (inet_pton(AF_INET6, host, &name->v6.sin6_addr) == 1) {
        name->v6.sin6_family = AF_INET6;
        name->v6.sin6_port = htons((uint16_t)port);
        return 1;
    }
    return 0;
}

typedef struct {
    Key from_client, from_peer;
    Name client, peer;
    uint32_t listener, socket;
    int listener_descriptor, socket_descriptor;
    uint16_t channel;
    long long expires_ns;
} Pair;

/* The two routes of a channel from Python's arguments. 1: good, 0: none are made for it, -1: error. */
static int read_pair(Drain *self, PyObject *args, Pair *pair) {
    const char *client, *peer;
    unsigned int client_port, peer_port, channel;
    if (!PyArg_ParseTuple(args, "i(sI)Ii(sI)L", &pair->listener_descriptor, &client, &client_port,
                          &channel, &pair->socket_descriptor, &peer, &peer_port, &pair->expires_ns))
        return -1;
    const Watched *listener = watched_of(self, pair->listener_descriptor);
    const Watched *socket = watched_of(self, pair->socket_descriptor);
    if (listener == NULL || socket == NULL || !listener->is_listener || socket->is_listener ||
        channel < 0x4000 || channel > 0x7fff || !read_name(client, client_port, &pair->client) ||
        !read_name(peer, peer_port, &pair->peer))
        return 0;
    pair->listener = listener->number;
    pair->socket = socket->number;
    pair->channel = (uint16_t)channel;
    return make_key(&pair->from_client, pair->listener, pair->channel, &pair->client) &&
           make_key(&pair->from_peer, pair->socket, 0, &pair->peer);
}

static PyObject *drain_put(Drain *self, PyObject *args) {
    Pair pair;
    int good = read_pair(self, args, &pair);
    if (good < 0)
        return NULL;
    if (!good || !make_room(self))
        Py_RETURN_FALSE;
    Route to_peer = {.key = pair.from_client, .expires_ns = pair.expires_ns, .to = pair.peer,
                     .to_number = pair.socket, .to_descriptor = pair.socket_descriptor,
                     .used = 1};
    Route to_client = {.key = pair.from_peer, .expires_ns = pair.expires_ns, .to = pair.client,
                       .to_number = pair.listener, .to_descriptor = pair.listener_descriptor,
                       .header_channel = pair.channel, .used = 1};
    put_route(self, &to_peer);
    put_route(self, &to_client);
    Py_RETURN_TRUE;
}

static PyObject *drain_drop(Drain *self, PyObject *args) {
    Pair pair;
    int good = read_pair(self, args, &pair);
    if (good < 0)
        return NULL;
    if (good) {
        remove_key(self, &pair.from_client);
        remove_key(self, &pair.from_peer);
    }
    Py_RETURN_NONE;
}

static PyObject *drain_datagrams(Drain *self, PyObject *Py_UNUSED(ignored)) {
    return Py_BuildValue("{sKsKsKsKsKsK}", "received_datagrams", self->received, "receive_errors",
                         self->receive_errors, "sent_datagrams", self->sent, "send_dropped_full",
                         self->dropped_full, "send_dropped_refused", self->dropped_refused,
                         "sent_trains", self->trains);
}

static PyObject *drain_relayed(Drain *self, PyObject *Py_UNUSED(ignored)) {
    return Py_BuildValue("KK", self->relayed, self->relayed_bytes);
}

static PyObject *drain_routes(Drain *self, PyObject *Py_UNUSED(ignored)) {
    return PyLong_FromUnsignedLong(self->routes_used);
}

static PyObject *drain_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(names)) {
    unsigned long long seed;
    if (!PyArg_ParseTuple(args, "K", &seed))
        return NULL;
    Drain *self = (Drain *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->seed = seed;
    self->routes = calloc(FIRST_ROUTES, sizeof *self->routes);
    self->routes_size = FIRST_ROUTES;
    /* Pages that no large datagram touches are never there. */
    void *slots = mmap(NULL, (size_t)SLOTS * SLOT_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    self->slots = slots == MAP_FAILED ? NULL : slots;
    if (self->routes == NULL || self->slots == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    for (uint32_t i = 0; i < SLOTS; i++) {
        struct msghdr *message = &self->in[i].msg_hdr;
        /* Not all at the same place of a page, where they would share few lines of the cache. */
        uint32_t offset = (i % 64) * 64;
        self->in_vector[i].iov_base = self->slots + (size_t)i * SLOT_BYTES + offset;
        self->in_vector[i].iov_len = DATAGRAM_BYTES;
        message->msg_iov = &self->in_vector[i];
        message->msg_iovlen = 1;
        message->msg_name = &self->in_name[i];
        message->msg_control = self->in_note[i];
    }
    return (PyObject *)self;
}

static void drain_dealloc(Drain *self) {
    if (self->slots != NULL) {
        OPEN(self->slots, (size_t)SLOTS * SLOT_BYTES);
        munmap(self->slots, (size_t)SLOTS * SLOT_BYTES);
    }
    free(self->routes);
    free(self->watched);
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMethodDef drain_methods[] = {
    {"watch", (PyCFunction)drain_watch, METH_VARARGS, NULL},
    {"forget", (PyCFunction)drain_forget, METH_VARARGS, NULL},
    {"put", (PyCFunction)drain_put, METH_VARARGS, NULL},
    {"drop", (PyCFunction)drain_drop, METH_VARARGS, NULL},
    {"turn", (PyCFunction)drain_turn, METH_VARARGS, NULL},
    {"datagrams", (PyCFunction)drain_datagrams, METH_NOARGS, NULL},
    {"relayed", (PyCFunction)drain_relayed, METH_NOARGS, NULL},
    {"routes", (PyCFunction)drain_routes, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot drain_slots[] = {
    {Py_tp_new, drain_new},
    {Py_tp_dealloc, drain_dealloc},
    {Py_tp_methods, drain_methods},
    {0, NULL},
};

static PyType_Spec drain_spec = {
    .name = "relays.fastpath._drain.Drain",
    .basicsize = sizeof(Drain),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = drain_slots,
};

static int prepare(PyObject *module) {
    PyObject *type = PyType_FromSpec(&drain_spec);
    if (type == NULL)
        return -1;
    int result = PyModule_AddObjectRef(module, "Drain", type);
    Py_DECREF(type);
    return result < 0 ? -1 : PyModule_AddIntConstant(module, "VERSION", VERSION);
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, prepare}, {0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_drain", .m_size = 0, .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__drain(void) { return PyModuleDef_Init(&module); }
