// A client by pion/turn, which shares no code with any other client that judges the relay:
//
//	pion udp|tcp|tls RELAY:PORT PEER:PORT AUTHORITY.pem MESSAGES
//
// as the user alice, whose password is in the variable PASSWORD. It asks for its address, allocates,
// sends messages to an echoing peer (by Send indications until its channel is bound, then by
// ChannelData), and gives back. The last line is JSON.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/pion/logging"
	"github.com/pion/turn/v2"
)

func main() {
	transport, server, peer, authority := os.Args[1], os.Args[2], os.Args[3], os.Args[4]
	messages, err := strconv.Atoi(os.Args[5])
	check(err)
	conn := dial(transport, server, authority)
	defer conn.Close()
	client, err := turn.NewClient(&turn.ClientConfig{
		STUNServerAddr: server,
		TURNServerAddr: server,
		Conn:           conn,
		Username:       "alice",
		Password:       os.Getenv("PASSWORD"),
		LoggerFactory:  logging.NewDefaultLoggerFactory(),
	})
	check(err)
	defer client.Close()
	check(client.Listen())
	mapped, err := client.SendBindingRequest()
	check(err)
	relayed, err := client.Allocate()
	check(err)
	to, err := net.ResolveUDPAddr("udp", peer)
	check(err)
	echoed := 0
	for number := 0; number < messages; number++ {
		if echo(relayed, to, fmt.Sprintf("message %d by %s", number, transport)) {
			echoed++
		}
	}
	answer := map[string]any{
		"local":   conn.LocalAddr().String(),
		"mapped":  mapped.String(),
		"relayed": relayed.LocalAddr().String(),
		"echoed":  echoed,
	}
	check(relayed.Close())
	check(json.NewEncoder(os.Stdout).Encode(answer))
}

func dial(transport, server, authority string) net.PacketConn {
	if transport == "udp" {
		conn, err := net.ListenPacket("udp4", "198.51.100.2:0")
		check(err)
		return conn
	}
	if transport == "tcp" {
		conn, err := net.Dial("tcp", server)
		check(err)
		return turn.NewSTUNConn(conn)
	}
	pem, err := os.ReadFile(authority)
	check(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	conn, err := tls.Dial("tcp", server, &tls.Config{RootCAs: roots, NextProtos: []string{"stun.turn"}})
	check(err)
	return turn.NewSTUNConn(conn)
}

// echo sends a message and waits for the very same from the very same peer.
func echo(relayed net.PacketConn, to net.Addr, message string) bool {
	if _, err := relayed.WriteTo([]byte(message), to); err != nil {
		return false
	}
	buffer := make([]byte, 1600)
	check(relayed.SetReadDeadline(time.Now().Add(10 * time.Second)))
	size, from, err := relayed.ReadFrom(buffer)
	return err == nil && from.String() == to.String() && string(buffer[:size]) == message
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
