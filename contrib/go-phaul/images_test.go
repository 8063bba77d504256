package relay

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func directory(t *testing.T, names ...string) string {
	dir := t.TempDir()
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("this is "+name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestTheInventoryGoesLastAndSomeStay(t *testing.T) {
	dir := directory(t, "inventory.img", "core-7.img", "stats-dump", "stats-dump.img", "irmap-cache", "irmap-cache.img", "dump.log", "mm-7.img")
	os.Symlink("../1", filepath.Join(dir, "parent"))
	if names, err := images(dir); err != nil || !reflect.DeepEqual(names, []string{"core-7.img", "mm-7.img", "inventory.img"}) {
		t.Errorf("%v: %v", names, err)
	}
	if _, err := images(directory(t, "core-7.img")); err == nil || !strings.Contains(err.Error(), "no inventory.img") {
		t.Errorf("%v", err)
	}
}

func TestARequestIsWhatCriuSends(t *testing.T) {
	if got := string(request("core-7.img")); got != "\x0c\x00\x00\x00\x0a\x0acore-7.img" {
		t.Errorf("%q", got)
	}
}

// proxyThatTakes is a proxy that takes so many images, and says what became of the snapshot.
func proxyThatTakes(t *testing.T, atMost int, taken chan<- []string) Daemon {
	ended := make(chan State, 1)
	return standInFor(t, func(call call, connection *net.UnixConn) {
		switch call.method {
		case "Open":
			session, err := asConnection(call.socket)
			if err != nil {
				t.Error(err)
				return
			}
			go func() {
				images := receive(t, session, atMost)
				session.Close()
				state := Whole
				if len(images) == atMost {
					state = Damaged
				}
				ended <- state
				taken <- images
			}()
			io.WriteString(connection, done)
		case "Watch":
			io.WriteString(connection, inState(call.id, Receiving, true))
			io.WriteString(connection, inState(call.id, <-ended, false))
		default:
			t.Errorf("%s was called", call.method)
		}
	})
}

// receive is the other side of a dump with --stream.
func receive(t *testing.T, session *net.UnixConn, atMost int) (images []string) {
	for len(images) < atMost {
		header := make([]byte, 4)
		if _, err := io.ReadFull(session, header); err != nil {
			if !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			return images
		}
		message := make([]byte, binary.LittleEndian.Uint32(header))
		io.ReadFull(session, message)
		one, rights := make([]byte, 1), make([]byte, 64)
		_, length, _, _, err := session.ReadMsgUnix(one, rights)
		if err != nil {
			t.Error(err)
			return images
		}
		pipe := descriptor(t, rights[:length])
		content, _ := io.ReadAll(pipe)
		pipe.Close()
		images = append(images, string(message[2:])+": "+string(content))
	}
	return images
}

func TestPushSendsEveryImageAndWaitsForTheCache(t *testing.T) {
	taken := make(chan []string, 1)
	proxy := proxyThatTakes(t, 10, taken)
	if err := proxy.Push(soon(t), "web", "", directory(t, "core-7.img", "inventory.img")); err != nil {
		t.Fatal(err)
	}
	want := []string{"core-7.img: this is core-7.img", "inventory.img: this is inventory.img"}
	if got := <-taken; !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
}

func TestWhyAProxyTakesNoMoreIsTold(t *testing.T) {
	taken := make(chan []string, 1)
	proxy := proxyThatTakes(t, 1, taken)
	err := proxy.Push(soon(t), "web", "", directory(t, "core-7.img", "fs-7.img", "mm-7.img", "inventory.img"))
	var damaged *DamagedError
	if !errors.As(err, &damaged) || damaged.Reason != "why not" {
		t.Errorf("%v", err)
	}
}
