// Two WebRTC peers by werift that may use relayed candidates alone:
//
//   node peers.cjs URL...        PASSWORD, NODE_EXTRA_CA_CERTS and NODE_PATH in the environment
//
// For each URL of the relay, all at once, they open a data channel through two allocations, and one
// sends back what the other says. Each line that is printed is the JSON of one URL; then the peers
// stay until the end of the standard input.
const { RTCPeerConnection } = require("werift");

const MESSAGES = 20;

function peer(url) {
  return new RTCPeerConnection({
    iceServers: [{ urls: url, username: "alice", credential: process.env.PASSWORD }],
    iceTransportPolicy: "relay",
  });
}

// The description with all candidates in it.
async function described(connection, description) {
  await connection.setLocalDescription(description);
  while (connection.iceGatheringState !== "complete") {
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return connection.localDescription;
}

function echoed(alice, bob, url) {
  bob.onDataChannel.subscribe((channel) => {
    channel.onMessage.subscribe((data) => channel.send(data));
  });
  const channel = alice.createDataChannel("test");
  const heard = [];
  channel.stateChanged.subscribe((state) => {
    if (state !== "open") return;
    for (let i = 0; i < MESSAGES; i++) channel.send(Buffer.from(`message ${i} by ${url}`));
  });
  return new Promise((resolve) => {
    channel.onMessage.subscribe((data) => {
      heard.push(data.toString());
      if (heard.length === MESSAGES) resolve(heard);
    });
  });
}

async function talk(url) {
  const [alice, bob] = [peer(url), peer(url)];
  const answers = echoed(alice, bob, url);
  const offer = await described(alice, await alice.createOffer());
  await bob.setRemoteDescription(offer);
  const answer = await described(bob, await bob.createAnswer());
  await alice.setRemoteDescription(answer);
  const heard = await answers;
  const candidates = [...(offer.sdp + answer.sdp).matchAll(/a=candidate:.* (\S+) \d+ typ (\w+)/g)];
  console.log(
    JSON.stringify({
      url,
      echoed: heard.filter((text, i) => text === `message ${i} by ${url}`).length,
      candidates: candidates.map(([, host, kind]) => `${kind} ${host}`),
    }),
  );
  return () => Promise.all([alice.close(), bob.close()]);
}

async function main() {
  const closers = await Promise.all(process.argv.slice(2).map(talk));
  await new Promise((resolve) => process.stdin.once("end", resolve).resume());
  await Promise.all(closers.map((close) => close()));
  process.exit(0);
}

main();
