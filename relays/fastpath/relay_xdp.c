// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * The fast path of the relay: ChannelData is unwrapped and wrapped where packets arrive, before the
 * kernel makes a socket buffer of them (XDP). `relays/fastpath/xdp.py` says which pairs of client
 * and peer; this program knows no others and decides nothing.
 *
 *   client -> listener        UDP, 4 bytes of channel number and length, data
 *   relayed address -> peer   UDP, data                                        and the other way
 *
 * Each direction of a channel has one entry in `flows`, found by addresses, ports and, from the
 * client, the channel number. It says with which addresses and ports the data goes on, and until
 * when. IPv4 and IPv6 may be mixed: all headers are written anew.
 *
 * Whatever is not exactly as expected goes to the kernel as it came (XDP_PASS), and so to the relay's
 * sockets: nothing is dropped here, and nothing is changed before all is known. `passed` counts
 * why. One packet of each entry in ten seconds goes that way too: what the kernel keeps for those
 * whom it hears (neighbours, tracked connections) stays fresh, and a neighbour that has moved is
 * noticed.
 *
 * Built by:  clang -O2 -target bpf -c relay_xdp.c -o relay_xdp.o && llvm-strip relay_xdp.o
 * (see tests/system/test_relay_fastpath_program.py). This file alone may also be used under
 * GPL-2.0, which the kernel asks of programs that call bpf_fib_lookup.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>

#define SECTION(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))

#define FAMILY_IPV4 2 /* AF_INET and AF_INET6 of Linux */
#define FAMILY_IPV6 10
#define LOOPBACK_INDEX 1
#define DONT_FRAGMENT __constant_htons(0x4000)
#define CHANNEL_BYTES 4
#define SHORTEST_FRAME 60
#define SAMPLE_INTERVAL_NS 10000000000ULL
#define MAX_FLOWS 131072
#define MAX_DEVICES 64

/* What `counts` counts, in this order: see NAMES in relays/fastpath/xdp.py. */
enum count {
	TO_PEER,
	TO_CLIENT,
	NOT_UDP,      /* not IPv4 or IPv6 with UDP straight in it; VLAN tags */
	IRREGULAR,    /* cut short, lengths that disagree, padding, a wrong IPv4 checksum */
	OPTIONS,      /* IPv4 options, IPv6 extension headers */
	FRAGMENT,
	NO_ENTRY,
	EXPIRED,
	CHECKSUM,     /* no UDP checksum, or one that hardware was to complete */
	HOP_LIMIT,
	TOO_SHORT,    /* would need padding on its way out */
	TOO_LARGE,    /* for the way out */
	NO_ROUTE,     /* not unicast from here, or the neighbour is not known yet */
	OTHER_DEVICE, /* goes out where the fast path is not */
	SAMPLED,
	NO_ROOM,      /* the driver leaves no space in front of the packet */
	COUNTS,
};

struct tally {
	__u64 packets;
	__u64 bytes;
};

/* IPv4 addresses are the first four bytes of sixteen, the rest is zero. Ports, channel: as on the
 * wire. `channel` is 0 for what comes from a peer. */
struct flow_key {
	__u32 source[4];
	__u32 target[4];
	__u16 source_port;
	__u16 target_port;
	__u16 channel;
	__u16 family;
};

/* `channel` is 0 for what goes to a peer. Times are of CLOCK_BOOTTIME. */
struct flow {
	__u64 expires_ns;
	__u64 sampled_ns;
	__u32 source[4];
	__u32 target[4];
	__u16 source_port;
	__u16 target_port;
	__u16 channel;
	__u16 family;
};

struct map_definition {
	__u32 type;
	__u32 key_size;
	__u32 value_size;
	__u32 max_entries;
	__u32 flags;
};

struct map_definition SECTION("maps") flows = {
	BPF_MAP_TYPE_HASH, sizeof(struct flow_key), sizeof(struct flow), MAX_FLOWS, BPF_F_NO_PREALLOC,
};
/* Indices of the network devices that carry this program: redirecting to others could be lost. */
struct map_definition SECTION("maps") devices = {
	BPF_MAP_TYPE_HASH, sizeof(__u32), sizeof(__u32), MAX_DEVICES, 0,
};
struct map_definition SECTION("maps") counts = {
	BPF_MAP_TYPE_PERCPU_ARRAY, sizeof(__u32), sizeof(struct tally), COUNTS, 0,
};

static void *(*const map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static __u64 (*const boot_ns)(void) = (void *)BPF_FUNC_ktime_get_boot_ns;
static long (*const redirect)(__u32 index, __u64 flags) = (void *)BPF_FUNC_redirect;
static long (*const adjust_head)(struct xdp_md *context, int change) =
	(void *)BPF_FUNC_xdp_adjust_head;
static long (*const fib_lookup)(void *context, struct bpf_fib_lookup *asked, int size,
				__u32 flags) = (void *)BPF_FUNC_fib_lookup;

/* What is kept of a packet while its headers are taken off. */
struct packet {
	struct flow_key key;
	__u16 ip_bytes;      /* length of the IP header */
	__u16 udp_bytes;     /* the length that the UDP header says */
	__u16 udp_length;    /* the same as on the wire */
	__u16 checksum;      /* of UDP */
	__u16 identification;
	__u16 fragment;
	__u8 traffic_class;
	__u8 hop_limit;
};

INLINE void count(__u32 what, __u32 bytes)
{
	struct tally *tally = map_lookup(&counts, &what);

	if (tally) {
		tally->packets += 1;
		tally->bytes += bytes;
	}
}

INLINE int pass(__u32 reason)
{
	count(reason, 0);
	return XDP_PASS;
}

INLINE __u16 folded(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

INLINE __u64 sum_of_addresses(const __u32 *source, const __u32 *target)
{
	return (__u64)source[0] + source[1] + source[2] + source[3] + target[0] + target[1] +
	       target[2] + target[3];
}

INLINE __u64 sum_of_ipv4(const struct iphdr *ip)
{
	const __u16 *words = (const void *)ip;
	__u64 sum = 0;

#pragma unroll
	for (int i = 0; i < 10; i++)
		sum += words[i];
	return sum;
}

/* 0, or the reason to pass. */
INLINE int read_ipv4(struct packet *packet, const struct iphdr *ip, void *end)
{
	if ((void *)(ip + 1) > end)
		return IRREGULAR;
	if (ip->version != 4 || ip->ihl < 5)
		return IRREGULAR;
	if (ip->protocol != IPPROTO_UDP)
		return NOT_UDP;
	if (ip->ihl != 5)
		return OPTIONS;
	if (ip->frag_off & ~DONT_FRAGMENT)
		return FRAGMENT;
	if (__builtin_bswap16(ip->tot_len) != end - (void *)ip || folded(sum_of_ipv4(ip)) != 0xffff)
		return IRREGULAR;
	packet->key.family = FAMILY_IPV4;
	packet->key.source[0] = ip->saddr;
	packet->key.target[0] = ip->daddr;
	packet->ip_bytes = sizeof(*ip);
	packet->identification = ip->id;
	packet->fragment = ip->frag_off;
	packet->traffic_class = ip->tos;
	packet->hop_limit = ip->ttl;
	return 0;
}

INLINE int read_ipv6(struct packet *packet, const struct ipv6hdr *ip, void *end)
{
	if ((void *)(ip + 1) > end)
		return IRREGULAR;
	if (ip->version != 6)
		return IRREGULAR;
	switch (ip->nexthdr) {
	case IPPROTO_UDP:
		break;
	case IPPROTO_FRAGMENT:
		return FRAGMENT;
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
		return OPTIONS;
	default:
		return NOT_UDP;
	}
	if (__builtin_bswap16(ip->payload_len) != end - (void *)(ip + 1))
		return IRREGULAR;
	packet->key.family = FAMILY_IPV6;
	__builtin_memcpy(packet->key.source, &ip->saddr, 16);
	__builtin_memcpy(packet->key.target, &ip->daddr, 16);
	packet->ip_bytes = sizeof(*ip);
	packet->identification = 0;
	packet->fragment = DONT_FRAGMENT;
	packet->traffic_class = ip->priority << 4 | ip->flow_lbl[0] >> 4;
	packet->hop_limit = ip->hop_limit;
	return 0;
}

INLINE int read_udp(struct packet *packet, const struct udphdr *udp, void *end)
{
	if ((void *)(udp + 1) > end)
		return IRREGULAR;
	packet->udp_length = udp->len;
	packet->udp_bytes = __builtin_bswap16(udp->len);
	if (packet->udp_bytes != end - (void *)udp)
		return IRREGULAR;
	packet->key.source_port = udp->source;
	packet->key.target_port = udp->dest;
	packet->checksum = udp->check;
	return 0;
}

/* A sum of no more than the addresses, the length and the protocol is what is left for hardware to
 * complete: so it comes from a machine's own virtual networks, and with trains of packets that look
 * like one. */
INLINE int has_whole_checksum(const struct packet *packet)
{
	__u16 partial = folded(sum_of_addresses(packet->key.source, packet->key.target) +
			       packet->udp_length + __constant_htons(IPPROTO_UDP));

	return packet->checksum != 0 && packet->checksum != partial;
}

/* RFC 1624: the checksum goes on with what changes, so one that was wrong stays wrong. The length
 * counts twice, in the header and beside the addresses. */
INLINE __u16 new_checksum(const struct packet *packet, const struct flow *flow, __u16 udp_length,
			  __u32 channel_header)
{
	const struct flow_key *old = &packet->key;
	__u64 sum = (__u16)~packet->checksum;

#pragma unroll
	for (int i = 0; i < 4; i++)
		sum += (__u64)(__u32)~old->source[i] + (__u32)~old->target[i];
	sum += (__u16)~old->source_port;
	sum += (__u16)~old->target_port;
	sum += 2 * (__u64)(__u16)~packet->udp_length;
	sum += sum_of_addresses(flow->source, flow->target);
	sum += (__u64)flow->source_port + flow->target_port + 2 * (__u64)udp_length;
	sum += flow->channel ? channel_header : (__u32)~channel_header;
	sum = (__u16)~folded(sum);
	return sum ? sum : 0xffff;
}

/* How a packet of this machine's own would go out: so with the loopback as the device that it comes
 * from, on which alone `forwarding` has to be set. */
INLINE int find_way(struct xdp_md *context, struct bpf_fib_lookup *way, const struct flow *flow,
		    const struct packet *packet, __u16 ip_total)
{
	way->family = flow->family;
	way->l4_protocol = IPPROTO_UDP;
	way->sport = flow->source_port;
	way->dport = flow->target_port;
	way->tot_len = ip_total;
	way->ifindex = LOOPBACK_INDEX;
	if (flow->family == FAMILY_IPV4) {
		way->tos = packet->traffic_class;
		way->ipv4_src = flow->source[0];
		way->ipv4_dst = flow->target[0];
	} else {
		way->flowinfo = __builtin_bswap32((__u32)packet->traffic_class << 20);
		__builtin_memcpy(way->ipv6_src, flow->source, 16);
		__builtin_memcpy(way->ipv6_dst, flow->target, 16);
	}
	switch (fib_lookup(context, way, sizeof(*way), 0)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
		break;
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return TOO_LARGE;
	default:
		return NO_ROUTE;
	}
	if (way->ifindex != context->ingress_ifindex && !map_lookup(&devices, &way->ifindex))
		return OTHER_DEVICE;
	return 0;
}

INLINE void write_ipv4(struct iphdr *ip, const struct packet *packet, const struct flow *flow,
		       __u16 ip_total)
{
	ip->version = 4;
	ip->ihl = 5;
	ip->tos = packet->traffic_class;
	ip->tot_len = __builtin_bswap16(ip_total);
	ip->id = packet->identification;
	ip->frag_off = packet->fragment;
	ip->ttl = packet->hop_limit - 1;
	ip->protocol = IPPROTO_UDP;
	ip->check = 0;
	ip->saddr = flow->source[0];
	ip->daddr = flow->target[0];
	ip->check = ~folded(sum_of_ipv4(ip));
}

INLINE void write_ipv6(struct ipv6hdr *ip, const struct packet *packet, const struct flow *flow,
		       __u16 udp_length)
{
	ip->version = 6;
	ip->priority = packet->traffic_class >> 4;
	ip->flow_lbl[0] = packet->traffic_class << 4;
	ip->flow_lbl[1] = 0;
	ip->flow_lbl[2] = 0;
	ip->payload_len = udp_length;
	ip->nexthdr = IPPROTO_UDP;
	ip->hop_limit = packet->hop_limit - 1;
	__builtin_memcpy(&ip->saddr, flow->source, 16);
	__builtin_memcpy(&ip->daddr, flow->target, 16);
}

/* The entry for this packet, NULL if there is none. From a client the channel number is part of the
 * key, and what could be ChannelData is looked up so first; a peer may send such bytes too. */
INLINE struct flow *find_flow(struct packet *packet, const __u16 *channel_header, void *end)
{
	struct flow *flow = 0;

	packet->key.channel = 0;
	if ((void *)(channel_header + 2) <= end && (channel_header[0] & 0xc0) == 0x40) {
		packet->key.channel = channel_header[0];
		flow = map_lookup(&flows, &packet->key);
		if (!flow)
			packet->key.channel = 0;
	}
	return flow ? flow : map_lookup(&flows, &packet->key);
}

SECTION("xdp") int relay(struct xdp_md *context)
{
	void *end = (void *)(long)context->data_end;
	struct ethhdr *ethernet = (void *)(long)context->data;
	void *ip = ethernet + 1;
	struct packet packet = {};
	int reason;

	if (ip > end)
		return pass(IRREGULAR);
	if (ethernet->h_dest[0] & 1)
		return pass(NOT_UDP);
	if (ethernet->h_proto == __constant_htons(ETH_P_IP))
		reason = read_ipv4(&packet, ip, end);
	else if (ethernet->h_proto == __constant_htons(ETH_P_IPV6))
		reason = read_ipv6(&packet, ip, end);
	else
		return pass(NOT_UDP);
	if (reason)
		return pass(reason);

	struct udphdr *udp = packet.key.family == FAMILY_IPV4 ? ip + sizeof(struct iphdr) :
								 ip + sizeof(struct ipv6hdr);
	reason = read_udp(&packet, udp, end);
	if (reason)
		return pass(reason);

	__u16 *channel = (void *)(udp + 1);
	struct flow *flow = find_flow(&packet, channel, end);

	if (!flow)
		return pass(NO_ENTRY);
	/* A copy: the memory of an entry that is removed just now may soon be that of another. */
	struct flow copy = *flow;
	__u64 now = boot_ns();

	if (now >= copy.expires_ns)
		return pass(EXPIRED);

	__u32 data_bytes = packet.udp_bytes - sizeof(*udp);
	__u32 channel_header;

	if (packet.key.channel) {
		if ((void *)(channel + 2) > end)
			return pass(IRREGULAR);
		data_bytes -= CHANNEL_BYTES;
		if (__builtin_bswap16(channel[1]) != data_bytes)
			return pass(IRREGULAR);
		channel_header = channel[0] + ((__u32)channel[1] << 16);
	} else {
		channel_header = copy.channel + ((__u32)__builtin_bswap16(data_bytes) << 16);
	}
	if (!has_whole_checksum(&packet))
		return pass(CHECKSUM);
	if (packet.hop_limit <= 1)
		return pass(HOP_LIMIT);

	__u32 new_udp_bytes = data_bytes + sizeof(*udp) + (copy.channel ? CHANNEL_BYTES : 0);
	__u16 new_udp_length = __builtin_bswap16(new_udp_bytes);
	__u32 new_ip_bytes = copy.family == FAMILY_IPV4 ? sizeof(struct iphdr) :
							   sizeof(struct ipv6hdr);
	__u32 new_total = new_ip_bytes + new_udp_bytes;

	if (sizeof(*ethernet) + new_total < SHORTEST_FRAME)
		return pass(TOO_SHORT);
	if (new_total > 0xffff)
		return pass(TOO_LARGE);

	struct bpf_fib_lookup way = {};

	reason = find_way(context, &way, &copy, &packet, new_total);
	if (reason)
		return pass(reason);
	if (now - copy.sampled_ns >= SAMPLE_INTERVAL_NS) {
		flow->sampled_ns = now;
		return pass(SAMPLED);
	}
	__u16 checksum = new_checksum(&packet, &copy, new_udp_length, channel_header);
	int change = (int)(packet.ip_bytes + packet.udp_bytes) - (int)new_total;

	if (adjust_head(context, change))
		return pass(NO_ROOM);

	/* From here on the packet is written; the checks are for the verifier and never fail. */
	end = (void *)(long)context->data_end;
	ethernet = (void *)(long)context->data;
	ip = ethernet + 1;
	if (copy.family == FAMILY_IPV4) {
		udp = ip + sizeof(struct iphdr);
		if ((void *)(udp + 1) > end)
			return XDP_DROP;
		ethernet->h_proto = __constant_htons(ETH_P_IP);
		write_ipv4(ip, &packet, &copy, new_total);
	} else {
		udp = ip + sizeof(struct ipv6hdr);
		if ((void *)(udp + 1) > end)
			return XDP_DROP;
		ethernet->h_proto = __constant_htons(ETH_P_IPV6);
		write_ipv6(ip, &packet, &copy, new_udp_length);
	}
	__builtin_memcpy(ethernet->h_dest, way.dmac, ETH_ALEN);
	__builtin_memcpy(ethernet->h_source, way.smac, ETH_ALEN);
	udp->source = copy.source_port;
	udp->dest = copy.target_port;
	udp->len = new_udp_length;
	udp->check = checksum;
	if (copy.channel) {
		channel = (void *)(udp + 1);
		if ((void *)(channel + 2) > end)
			return XDP_DROP;
		channel[0] = copy.channel;
		channel[1] = __builtin_bswap16(data_bytes);
	}
	count(packet.key.channel ? TO_PEER : TO_CLIENT, data_bytes);
	if (way.ifindex == context->ingress_ifindex)
		return XDP_TX;
	return redirect(way.ifindex, 0);
}

char SECTION("license") licence_of_this_file[] = "GPL";
